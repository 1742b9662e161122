import tracemalloc

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from training.metrics import neighbours as module
from training.metrics.intervals import jackknife_interval
from training.metrics.neighbours import neighbours


def draw(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 4)) + shift


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """By scikit-learn; the nearest of all is the sample itself."""
    return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]


def by_force(real: np.ndarray, fake: np.ndarray, k: int = 3, density_k: int = 5) -> dict[str, float]:
    distance = np.linalg.norm(real[:, None] - fake[None], axis=-1)
    closed, open_ = radii(real, k)[:, None], radii(real, density_k)[:, None]
    return {
        "precision": (distance <= closed).any(axis=0).mean(),
        "recall": (distance <= radii(fake, k)).any(axis=1).mean(),
        "density": (distance < open_).sum(axis=0).mean() / density_k,
        "coverage": (distance < open_).any(axis=1).mean(),
    }


@pytest.mark.parametrize("tile", [1024, 7])
@pytest.mark.parametrize("shift", [0.0, 1.0, 50.0])
def test_all_four_are_their_definitions_with_intervals_of_the_jackknife(tile, shift, monkeypatch):
    monkeypatch.setattr(module, "_TILE", tile)
    real, fake = draw(53, 0), draw(64, 1, shift)
    found, expected = neighbours(real, fake), by_force(real, fake)
    for name, value in expected.items():
        share = getattr(found, name)
        assert share.value == pytest.approx(value), name
        jackknifed = jackknife_interval(
            lambda kept, name=name: float(by_force(real, fake[kept])[name]), len(fake), max_blocks=16
        )
        assert share.interval == pytest.approx(jackknifed, abs=1e-9), name


def test_copies_are_precise_recalled_and_covered():
    found = neighbours(draw(60, 2), draw(60, 2))
    assert (found.precision.value, found.recall.value, found.coverage.value) == (1.0, 1.0, 1.0)


def test_one_mode_of_two_is_precise_and_half_recalled():
    real = np.concatenate([draw(50, 3), draw(50, 4, shift=100.0)])
    found = neighbours(real, draw(100, 5))
    assert found.precision.value > 0.8 and 0.3 <= found.recall.value <= 0.5 and found.coverage.value <= 0.5


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="more than 5 real and"):
        neighbours(draw(5, 0), draw(64, 1))
    with pytest.raises(ValueError, match="more than 5 real and 4 generated samples, got 60 and 3"):
        neighbours(draw(60, 0), draw(3, 1))
    with pytest.raises(ValueError, match="width 4 and 3"):
        neighbours(draw(60, 0), draw(60, 1)[:, :3])
    with pytest.raises(ValueError, match="sample 2 hold NaN"):
        neighbours(draw(60, 0), np.where(np.arange(60)[:, None] == 2, np.nan, draw(60, 1)))


def test_memory_is_that_of_tiles_and_not_of_all_pairs():
    """6,000 by 6,000 distances are 288 MB at once; 50,000 by 50,000 would be 20 GB."""
    rng = np.random.default_rng(0)
    real, fake = (rng.standard_normal((6000, 4)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    neighbours(real, fake)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 72e6
