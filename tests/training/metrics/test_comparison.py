"""A against B: deletions are the metrics of what is left, and pairing narrows the interval of a difference."""

from __future__ import annotations

import numpy as np
import pytest

from training.metrics.clip_score import clip_score
from training.metrics.comparison import Measured, difference
from training.metrics.frechet import frechet_distance
from training.metrics.intervals import Estimate, frechet_estimate, index_blocks, jackknife_interval
from training.metrics.kernel import cmmd
from training.metrics.moments import moments_of
from training.metrics.protocol import Protocol


def measured(value: float, deletions=None, better="lower", **protocol) -> Measured:
    made = Protocol(**({"metric": "fd_clip", "n": 90, "weights": {"denoiser": str(value)}} | protocol))
    return Measured(
        name="fd_clip", value=value, low=value, high=value, n=90, better=better, meaning="", protocol=made,
        deletions=deletions,
    )  # fmt: skip


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Real (200, 6), A (90, 6), and B: A moved a little, with a little noise of its own."""
    rng = np.random.default_rng(5)
    real, a = rng.normal(size=(200, 6)), rng.normal(0.3, 1.0, (90, 6))
    return real, a, a - 0.02 + rng.normal(0, 0.01, (90, 6))


def test_deletions_are_the_metric_of_what_is_left(sets):
    real, a, _ = sets
    reference = moments_of(real)
    left = [np.delete(a, block, axis=0) for block in index_blocks(90, 32)]
    found = frechet_estimate(reference, a).deletions
    assert found.sizes == tuple(90 - len(rest) for rest in left)
    wanted = [frechet_distance(reference, moments_of(rest)).value for rest in left]
    assert found.values == pytest.approx(wanted, rel=1e-9)
    assert Estimate.of_mean(a[:, 0]).deletions.values == pytest.approx([rest[:, 0].mean() for rest in left])
    unit, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (real, a))
    left = [np.delete(others, block, axis=0) for block in index_blocks(90, 16)]
    assert cmmd(unit, others).deletions.values == pytest.approx([cmmd(unit, rest).unbiased for rest in left])


def test_the_interval_of_a_difference_is_the_jackknife_of_the_difference(sets):
    real, a, b = sets
    reference = moments_of(real)

    def apart(kept: list[int]) -> float:
        return sum(
            sign * frechet_distance(reference, moments_of(x[kept])).value for sign, x in ((1, b), (-1, a))
        )

    rows = [
        measured(frechet_distance(reference, moments_of(x)).value, frechet_estimate(reference, x).deletions)
        for x in (a, b)
    ]
    held = difference(*rows)
    assert (held.low, held.high) == pytest.approx(jackknife_interval(apart, 90), rel=1e-6)


def test_pairing_tells_apart_what_two_intervals_do_not(sets):
    real, a, b = sets
    reference = moments_of(real)
    spread = jackknife_interval(lambda kept: frechet_distance(reference, moments_of(a[kept])).value, 90)
    rows = [
        measured(frechet_distance(reference, moments_of(x)).value, frechet_estimate(reference, x).deletions)
        for x in (a, b)
    ]
    assert spread[0] < rows[1].value < spread[1], "B lies within A's own interval"
    assert difference(*rows).verdict == "better" and difference(*rows[::-1]).verdict == "worse"
    assert difference(rows[0], rows[0]).model_dump() == {
        "value": 0, "low": 0, "high": 0, "verdict": "undecided",
    }  # fmt: skip


def test_higher_is_better_where_the_metric_says_so(sets):
    _, a, b = sets
    values = [clip_score(x, np.ones_like(x)).per_sample for x in (a, b)]
    rows = [
        measured(float(v.mean()), Estimate.of_mean(v).deletions, better="higher", metric="clip_score")
        for v in values
    ]
    assert values[1].mean() < values[0].mean() and difference(*rows).verdict == "worse"


def test_two_protocols_have_no_difference_and_unequal_blocks_no_interval():
    with pytest.raises(ValueError, match="fd_clip was measured under two protocols: resize tf1 and clean"):
        difference(measured(1.0, resize="tf1"), measured(2.0, resize="clean"))
    unpaired = difference(measured(1.0), measured(3.0))
    assert (unpaired.value, unpaired.low, unpaired.verdict) == (2.0, None, "undecided")
