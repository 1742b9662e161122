"""Precision, recall, density and coverage: whether generated features lie where real ones do, and the other way round.

All four compare Euclidean distances with the distance to a k-th nearest neighbour. Distances are taken in tiles, so that
50,000 by 50,000 samples need some hundred megabytes; features may be memory maps.

    precision   generated samples within the ball (k = 3, closed) of some real one         Kynkäänniemi et al. 2019, eq. 1-2
    recall      real samples within the ball (k = 3, closed) of some generated one
    density     real balls (k = 5, open) that a generated sample lies in, over k; may exceed 1       Naeem et al. 2020, eq. 4
    coverage    real samples with a generated one in their own ball (k = 5, open)                                      eq. 5

A sample is not its own neighbour. Closed balls are those of the published code of the first two, open ones of the others.

Legend: N real and M generated samples, D feature width, G blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from training.metrics.intervals import Estimate, index_blocks
from training.metrics.moments import finite_rows

PRECISION_K = 3
DENSITY_K = 5
BLOCKS = 16
"""Deletions of the jackknife."""
_TILE = 1024


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The four measures, over blocks of generated samples; the real ones are fixed."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbours(
    real: np.ndarray,
    fake: np.ndarray,
    *,
    k: int = PRECISION_K,
    density_k: int = DENSITY_K,
    group: int = 1,
) -> Neighbours:
    """The measures of `fake` (M, D) against `real` (N, D) features, float64.

    Raises ValueError for different widths, rows that are not finite, or fewer samples than the neighbours that are
    looked for (on the generated side, when a block is left out).
    """
    blocks = index_blocks(len(fake), BLOCKS, group) if len(fake) > 1 else [np.arange(len(fake))]
    _require_enough(real, fake, max(k, density_k), k + max(len(block) for block in blocks))
    whole_real = [np.arange(len(real))]
    near_real = _nearest(real, whole_real, max(k, density_k))[:, 0]  # (N, k)
    radius, open_radius = near_real[:, k - 1], near_real[:, density_k - 1]
    near_fake = _nearest(fake, blocks, k)  # (M, G, k)
    all_of, deleted = _radii(near_fake, k)
    precise, dense = np.zeros(len(fake), bool), np.zeros(len(fake), np.int64)
    recalled = np.zeros((len(blocks) + 1, len(real)), bool)
    covered = np.zeros((len(blocks), len(real)), bool)
    for rows, g, columns, squared in _distances(real, fake, blocks):
        precise[columns] |= (squared <= radius[rows, None]).any(axis=0)
        within = squared < open_radius[rows, None]
        dense[columns] += within.sum(axis=0)
        covered[g, rows] |= within.any(axis=1)
        hit = (squared <= all_of[columns]).any(axis=1)
        recalled[-1, rows] |= hit
        for h in range(len(blocks)):
            if h != g:
                # a ball only grows when neighbours are left out, and most do not change at all
                grown = deleted[h, columns] > all_of[columns]
                recalled[h, rows] |= hit | (squared[:, grown] <= deleted[h, columns][grown]).any(axis=1)
    times_covered = covered.sum(axis=0)
    left_covered = [float((times_covered > own).mean()) for own in covered]
    coverage = float((times_covered > 0).mean())
    recall = float(recalled[-1].mean())
    return Neighbours(
        precision=Estimate.of_mean(precise, max_blocks=BLOCKS, group=group),
        recall=Estimate.of(recall, recalled[:-1].mean(axis=1), blocks),
        density=Estimate.of_mean(dense / density_k, max_blocks=BLOCKS, group=group),
        coverage=Estimate.of(coverage, left_covered, blocks),
    )


def _nearest(features: np.ndarray, blocks: list[np.ndarray], k: int) -> np.ndarray:
    """(N, G, k) squared distances to the k nearest other rows in each block, infinite where a block has fewer."""
    found = np.full((len(features), len(blocks), k), np.inf)
    for rows, g, columns, squared in _distances(features, features, blocks):
        same = np.arange(rows.start, rows.stop)
        inside = (same >= columns.start) & (same < columns.stop)
        squared[np.flatnonzero(inside), same[inside] - columns.start] = np.inf
        candidates = np.concatenate([found[rows, g], squared], axis=1)
        found[rows, g] = np.sort(np.partition(candidates, k - 1, axis=1)[:, :k], axis=1)
    return found


def _radii(nearest: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared radii of all balls (M,), and with each block left out (G, M)."""
    count, num_blocks, _ = nearest.shape
    kept = [np.arange(num_blocks) != g for g in range(num_blocks)]
    radii = [
        _kth(nearest.reshape(count, -1), k),
        *(_kth(nearest[:, keep].reshape(count, -1), k) for keep in kept),
    ]
    return radii[0], np.stack(radii[1:])


def _kth(values: np.ndarray, k: int) -> np.ndarray:
    return np.partition(values, k - 1, axis=1)[:, k - 1]


def _distances(
    x: np.ndarray, y: np.ndarray, blocks: list[np.ndarray]
) -> Iterator[tuple[slice, int, slice, np.ndarray]]:
    """(rows of x, block of y, rows of y, squared distances between them), tile by tile."""
    for start in range(0, len(x), _TILE):
        rows = slice(start, min(start + _TILE, len(x)))
        mine = np.asarray(x[rows], np.float64)
        norms = (mine * mine).sum(axis=1)[:, None]
        for g, block in enumerate(blocks):
            first, end = int(block[0]), int(block[-1]) + 1
            for at in range(first, end, _TILE):
                columns = slice(at, min(at + _TILE, end))
                theirs = np.asarray(y[columns], np.float64)
                squared = norms + (theirs * theirs).sum(axis=1) - 2.0 * (mine @ theirs.T)
                yield rows, g, columns, np.maximum(squared, 0.0)


def _require_enough(real: np.ndarray, fake: np.ndarray, real_k: int, fake_needs: int) -> None:
    for features in (real, fake):
        for start in range(0, max(len(features), 1), _TILE):
            finite_rows(features[start : start + _TILE], first_row=start)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features of width {real.shape[1]} and {fake.shape[1]} have no distance: use one extractor"
        )
    if len(real) <= real_k or len(fake) <= fake_needs:
        raise ValueError(
            f"precision, recall, density and coverage need more than {real_k} real and {fake_needs} generated samples, "
            f"got {len(real)} and {len(fake)}"
        )
