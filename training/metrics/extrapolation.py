"""Fréchet distance at infinitely many generated samples: the bias of order 1/N extrapolated away."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.metrics.frechet import Gaussian, frechet_distance
from training.metrics.intervals import Deletions, index_blocks
from training.metrics.moments import Moments, moments_of, without

POINTS = 8
BLOCKS = 8
"""Deletions of the jackknife; each fits all points again."""


@dataclass(frozen=True, slots=True)
class Extrapolated:
    """The intercept of a straight line in 1/N. May be slightly negative. Report it with its residual, never alone."""

    value: float
    deletions: Deletions
    """Over blocks of generated samples; the real ones are fixed, and their own bias stays."""
    residual: float
    """Root mean square of what the line leaves, in the distance's units: large where the bias is not of order 1/N."""
    sizes: tuple[int, ...]
    """The N that were fitted."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.deletions.interval(self.value)


def frechet_at_infinity(
    reference: Gaussian, features: np.ndarray, *, points: int = POINTS, seed: int = 0, group: int = 1
) -> Extrapolated:
    """The distance of `features` (N, D) from `reference`, extrapolated (Chong & Forsyth 2020, "Effectively unbiased FID").

    `points` subsets of sizes from N / 4 to N, evenly spaced in 1/N, nested in one order that `seed` draws. Raises ValueError
    for fewer than 64 samples.
    """
    n = len(features)
    sizes = [round(n / x) for x in np.linspace(4.0, 1.0, points)]
    if n < 64:
        raise ValueError(f"an extrapolation in 1/N needs at least 64 generated images, got {n}")
    order = np.random.default_rng(seed).permutation(n)
    block_of = np.empty(n, np.int64)
    blocks = index_blocks(n, BLOCKS, group)
    for number, block in enumerate(blocks):
        block_of[block] = number
    table = np.array([_distances(reference, features, order[:size], block_of, len(blocks)) for size in sizes])
    value, residual = _fitted(sizes, table[:, 0])
    counts = [[int((block_of[order[:size]] != g).sum()) for size in sizes] for g in range(len(blocks))]
    deleted = tuple(_fitted(counts[g], table[:, 1 + g])[0] for g in range(len(blocks)))
    return Extrapolated(
        value, Deletions(sizes=tuple(map(len, blocks)), values=deleted), residual, tuple(sizes)
    )


def _distances(
    reference: Gaussian, features: np.ndarray, subset: np.ndarray, block_of: np.ndarray, num_blocks: int
) -> list[float]:
    """Of one subset, and of what is left of it without each block."""
    subset = np.sort(subset)
    whole = moments_of(features[subset])
    found = [_distance(reference, whole)]
    for g in range(num_blocks):
        part = subset[block_of[subset] == g]
        rest = without(whole, moments_of(features[part])) if len(part) else whole
        found.append(_distance(reference, rest))
    return found


def _distance(reference: Gaussian, moments: Moments) -> float:
    return frechet_distance(reference, moments, exact=False).value


def _fitted(sizes: list[int], distances: np.ndarray) -> tuple[float, float]:
    slope, intercept = np.polyfit(1.0 / np.array(sizes), distances, 1)
    left = distances - (intercept + slope / np.array(sizes))
    return float(intercept), float(np.sqrt(np.mean(left**2)))
