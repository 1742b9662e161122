"""Kernel distances between two sets of features: CMMD (Gaussian kernel) and KID (cubic kernel). All in float64.

Legend: N, M samples, D feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.metrics.moments import finite_rows

_TILE = 1024
"""Rows per tile of a kernel matrix: 8 MB of float64 at a time, whatever N and M."""

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Cmmd:
    """CMMD times 1000, in both estimators."""

    unbiased: float
    """The U-statistic: 0 on average for two samples of one distribution, so it may be slightly negative."""
    biased: float
    """The V-statistic, as published; larger by about 1000 (1 - E k)(1/N + 1/M). Only for comparing with published numbers."""


def cmmd(x: np.ndarray, y: np.ndarray, *, sigma: float = 10.0, scale: float = 1000.0) -> Cmmd:
    """Squared maximum mean discrepancy of `x` (N, D) and `y` (M, D) under exp(-|x - y|^2 / (2 sigma^2)), times `scale`
    (Jayasumana et al. 2024, "Rethinking FID"; Gretton et al. 2012, eq. 3 and 5).

    Meant for L2-normalised CLIP image embeddings; nothing is normalised here. Raises ValueError for fewer than two rows
    on a side, different widths, or rows that are not finite.
    """
    x, y = _two_samples(x, y)
    # At sigma = 10 the kernel of unit vectors lies in [0.98, 1]: sum k - 1, whose ones cancel exactly in the MMD.
    kernel = _gaussian_minus_one(sigma)
    xx, yy, xy = _sum_within(kernel, x), _sum_within(kernel, y), _sum_between(kernel, x, y)
    n, m = len(x), len(y)
    cross = 2.0 * xy / (n * m)
    return Cmmd(
        unbiased=scale * (xx / (n * (n - 1)) + yy / (m * (m - 1)) - cross),
        biased=scale * (xx / (n * n) + yy / (m * m) - cross),
    )


def deleted_cmmd(x: np.ndarray, y: np.ndarray, blocks: Sequence[np.ndarray]) -> list[float]:
    """The unbiased `cmmd` of `x` and what is left of `y` without each of `blocks`, which cut y's indices into runs.

    One pass: sums over pairs of blocks are taken from the whole, so no kernel value is computed twice.
    """
    x, y = _two_samples(x, y)
    kernel = _gaussian_minus_one(10.0)
    parts = [y[block] for block in blocks]
    cross = np.array([_sum_between(kernel, part, x) for part in parts])
    within = np.array([[_sum_between(kernel, a, b) for b in parts] for a in parts])
    np.fill_diagonal(within, [_sum_within(kernel, part) for part in parts])
    real = _sum_within(kernel, x) / (len(x) * (len(x) - 1))
    deleted = []
    for at, part in enumerate(parts):
        kept = len(y) - len(part)
        own = within.sum() - 2.0 * within[at].sum() + within[at, at]
        between = 2.0 * (cross.sum() - cross[at]) / (len(x) * kept)
        deleted.append(1000.0 * float(real + own / (kept * (kept - 1)) - between))
    return deleted


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Kernel Inception distance of `x` (N, D) and `y` (M, D): the unbiased squared MMD under (x.y / D + 1)^3
    (Bińkowski et al. 2018, eq. 4), over all pairs and without subsets, so that it draws no random numbers.

    May be slightly negative. Raises ValueError as `cmmd` does.
    """
    x, y = _two_samples(x, y)
    n, m = len(x), len(y)
    within = _sum_within(_cubic, x) / (n * (n - 1)) + _sum_within(_cubic, y) / (m * (m - 1))
    return within - 2.0 * _sum_between(_cubic, x, y) / (n * m)


def _two_samples(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = finite_rows(x), finite_rows(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of width {x.shape[1]} and {y.shape[1]} have no distance: use one extractor"
        )
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an unbiased MMD needs at least 2 samples on each side, got {len(x)} and {len(y)}")
    return x, y


def _gaussian_minus_one(sigma: float) -> Kernel:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2.0 * (x @ y.T)
        return np.expm1(-np.maximum(squared, 0.0) / (2.0 * sigma**2))

    return kernel


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _sum_between(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> float:
    return math.fsum(float(kernel(rows, columns).sum()) for rows in _tiles(x) for columns in _tiles(y))


def _sum_within(kernel: Kernel, x: np.ndarray) -> float:
    """Sum over all ordered pairs of different rows: the tiles above the diagonal count twice."""
    tiles = _tiles(x)
    sums = []
    for i, rows in enumerate(tiles):
        own = kernel(rows, rows)
        np.fill_diagonal(own, 0.0)
        sums.append(float(own.sum()))
        sums.extend(2.0 * float(kernel(rows, columns).sum()) for columns in tiles[i + 1 :])
    return math.fsum(sums)


def _tiles(x: np.ndarray) -> list[np.ndarray]:
    return [x[start : start + _TILE] for start in range(0, len(x), _TILE)]
