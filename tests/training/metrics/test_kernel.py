import math

import numpy as np
import pytest

from training.metrics import kernel
from training.metrics.intervals import jackknife_interval
from training.metrics.kernel import cmmd, kid, kid_of_subsets


def unit_rows(n: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((n, width)) + shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pairs(k, x, y, *, distinct: bool) -> float:
    return math.fsum(k(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (distinct and i == j))


def looped_mmd(k, x, y) -> tuple[float, float]:
    n, m = len(x), len(y)
    cross = 2 * pairs(k, x, y, distinct=False) / (n * m)
    unbiased = pairs(k, x, x, distinct=True) / (n * (n - 1)) + pairs(k, y, y, distinct=True) / (m * (m - 1))
    biased = pairs(k, x, x, distinct=False) / n**2 + pairs(k, y, y, distinct=False) / m**2
    return unbiased - cross, biased - cross


def gaussian(p, q) -> float:
    return math.exp(-float(np.sum((p - q) ** 2)) / 200.0)


def cubic(p, q) -> float:
    return (float(p @ q) / len(p) + 1.0) ** 3


@pytest.fixture(params=[1024, 7])
def tile(request, monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", request.param)


@pytest.mark.usefixtures("tile")
def test_cmmd_is_its_definition_in_both_estimators():
    x, y = unit_rows(31, 16, 0), unit_rows(24, 16, 1, shift=0.2)
    unbiased, biased = looped_mmd(gaussian, x, y)
    result = cmmd(x, y)
    assert result.unbiased == pytest.approx(1000 * unbiased, rel=1e-9)
    assert result.biased == pytest.approx(1000 * biased, rel=1e-9)


@pytest.mark.usefixtures("tile")
def test_kid_is_its_definition():
    x, y = unit_rows(31, 16, 2) * 4, unit_rows(24, 16, 3, shift=0.2) * 4
    assert kid(x, y).value == pytest.approx(looped_mmd(cubic, x, y)[0], rel=1e-11)


def test_cmmd_keeps_its_digits_where_the_kernel_is_almost_one():
    # Two sets of points a step h apart along one axis: the biased MMD^2 is 2 - 2 exp(-h^2 / 200) for a split by side.
    h = 1e-6
    x, y = np.zeros((3, 3)), np.zeros((3, 3))
    y[:, 0] = h
    assert cmmd(x, y).biased == pytest.approx(-2000 * math.expm1(-(h**2) / 200), rel=1e-12)
    assert cmmd(x, y).unbiased == pytest.approx(cmmd(x, y).biased, rel=1e-12)


def test_identical_sets_have_biased_cmmd_zero():
    x = unit_rows(50, 8, 4)
    assert abs(cmmd(x, x).biased) < 1e-12


def test_only_the_unbiased_form_is_centred_for_equal_distributions():
    results = [cmmd(unit_rows(40, 8, 2 * s), unit_rows(40, 8, 2 * s + 1)) for s in range(200)]
    unbiased = np.array([result.unbiased for result in results])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / math.sqrt(len(unbiased))
    assert min(result.biased for result in results) > 0.0


def test_kernel_distances_ignore_the_order_of_samples():
    x, y = unit_rows(30, 8, 5), unit_rows(30, 8, 6)
    assert cmmd(x[::-1], y).unbiased == pytest.approx(cmmd(x, y).unbiased, rel=1e-10)
    assert kid(x, y[::-1]).value == pytest.approx(kid(x, y).value, rel=1e-10)


@pytest.mark.parametrize("metric", [cmmd, kid])
def test_what_cannot_be_compared_is_refused(metric):
    x = unit_rows(5, 4, 7)
    with pytest.raises(ValueError, match="at least 2 samples"):
        metric(x[:1], x)
    with pytest.raises(ValueError, match="width 4 and 3"):
        metric(x, x[:, :3])
    with pytest.raises(ValueError, match="sample 2 hold"):
        metric(x, np.where(np.arange(5)[:, None] == 2, np.nan, x))


@pytest.mark.usefixtures("tile")
def test_intervals_from_block_sums_are_the_jackknife_that_computes_the_kernel_anew():
    x, y = unit_rows(31, 16, 2), unit_rows(37, 16, 3, shift=0.2)
    for found, interval in ((cmmd(x, y).interval, "unbiased"), (cmmd(x, y).biased_interval, "biased")):
        again = jackknife_interval(
            lambda kept, interval=interval: getattr(cmmd(x, y[kept]), interval), 37, max_blocks=16
        )
        assert found == pytest.approx(again, rel=1e-8)
    again = jackknife_interval(lambda kept: kid(x, y[kept]).value, 37, max_blocks=16)
    assert kid(x, y).interval == pytest.approx(again, rel=1e-8)


def test_kid_of_subsets_is_the_mean_over_the_drawn_subsets():
    x, y = unit_rows(60, 8, 4) * 3, unit_rows(70, 8, 5, shift=0.3) * 3
    generator = np.random.RandomState(7)
    values = []
    for _ in range(5):
        fake, real = generator.choice(70, 20, replace=False), generator.choice(60, 20, replace=False)
        values.append(kid(x[real], y[fake]).value)
    found = kid_of_subsets(x, y, subsets=5, size=20, seed=7)
    assert (found.mean, found.std) == pytest.approx((np.mean(values), np.std(values)))
    low, high = found.interval
    assert low < found.mean < high
    with pytest.raises(ValueError, match="subsets of 1000 needs that many"):
        kid_of_subsets(x, y)
