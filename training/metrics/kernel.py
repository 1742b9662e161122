"""Kernel distances between two sets of features: CMMD (Gaussian kernel) and KID (cubic kernel). All in float64.

The kernel is summed block by block over the generated samples, so that the jackknife deletes a block by subtracting sums:
every pair is visited once, and features may be a memory map, of which some tiles at a time are held.

Legend: N real and M generated samples, D feature width, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.metrics.intervals import Deletions, Estimate, index_blocks
from training.metrics.moments import finite_rows

BLOCKS = 16
"""Deletions of the jackknife."""
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
    deletions: Deletions
    """Of the unbiased form, over blocks of generated samples; the real ones are fixed."""
    biased_deletions: Deletions

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the unbiased form."""
        return self.deletions.interval(self.unbiased)

    @property
    def biased_interval(self) -> tuple[float, float]:
        """95 %, of the biased form."""
        return self.biased_deletions.interval(self.biased)


@dataclass(frozen=True, slots=True)
class KidOfSubsets:
    """The published form: the mean over random subsets."""

    mean: float
    std: float
    """Over the subsets, as other tools print it. It is no error of the mean: more subsets leave it as it is."""
    deletions: Deletions
    """Of the mean with the subsets as they were drawn, over blocks of generated samples."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of the mean."""
        return self.deletions.interval(self.mean)


def cmmd(x: np.ndarray, y: np.ndarray, *, sigma: float = 10.0, scale: float = 1000.0, group: int = 1) -> Cmmd:
    """Squared maximum mean discrepancy of `x` (N, D) and `y` (M, D) under exp(-|x - y|^2 / (2 sigma^2)), times `scale`
    (Jayasumana et al. 2024, "Rethinking FID"; Gretton et al. 2012, eq. 3 and 5).

    Meant for L2-normalised CLIP image embeddings; nothing is normalised here. Raises ValueError for fewer than two rows
    on a side, different widths, or rows that are not finite.
    """
    # At sigma = 10 the kernel of unit vectors lies in [0.98, 1]: sum k - 1, whose ones cancel exactly in the MMD.
    sums = _sums(_gaussian_minus_one(sigma), x, y, group)
    sizes, rests = tuple(sums.block_sizes), sums.deletions()
    return Cmmd(
        scale * sums.unbiased(),
        scale * sums.biased(),
        Deletions(sizes=sizes, values=tuple(scale * rest.unbiased() for rest in rests)),
        Deletions(sizes=sizes, values=tuple(scale * rest.biased() for rest in rests)),
    )


def kid(x: np.ndarray, y: np.ndarray, *, group: int = 1) -> Estimate:
    """Kernel Inception distance of `x` (N, D) and `y` (M, D): the unbiased squared MMD under (x.y / D + 1)^3
    (Bińkowski et al. 2018, eq. 4), over all pairs and without subsets, so that it draws no random numbers. May be
    slightly negative.

    Raises ValueError as `cmmd` does.
    """
    sums = _sums(_cubic, x, y, group)
    deleted = tuple(rest.unbiased() for rest in sums.deletions())
    return Estimate(sums.unbiased(), Deletions(sizes=tuple(sums.block_sizes), values=deleted))


def kid_of_subsets(
    x: np.ndarray, y: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020, group: int = 1
) -> KidOfSubsets:
    """The mean of `kid` over `subsets` random pairs of `size` rows of `y` and of `x`, drawn without replacement.

    The draws are those of torch-fidelity for this seed. Raises ValueError as `kid` does, and for fewer rows than `size`.
    """
    _require_comparable(x, y)
    if min(len(x), len(y)) < size:
        raise ValueError(
            f"KID over subsets of {size} needs that many images on each side, got {len(x)} real and {len(y)} generated: "
            "use kid, which takes all pairs"
        )
    generator = np.random.RandomState(seed)
    blocks = index_blocks(len(y), BLOCKS, group)
    block_of = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
    drawn = [_drawn(x, y, block_of, size, generator) for _ in range(subsets)]
    values = np.array([sums.unbiased() for sums in drawn])
    deleted = np.mean([[rest.unbiased() for rest in sums.deletions()] for sums in drawn], axis=0)
    mean = float(values.mean())
    deletions = Deletions(sizes=tuple(map(len, blocks)), values=tuple(deleted.tolist()))
    return KidOfSubsets(mean, float(values.std()), deletions)


@dataclass(frozen=True, eq=False, slots=True)
class _Sums:
    """Sums of the kernel over pairs of different rows."""

    n: int
    sizes: np.ndarray
    """(G,) rows of y per block."""
    xx: float
    xy: np.ndarray
    """(G,)"""
    yy: np.ndarray
    """(G, G)"""

    @property
    def block_sizes(self) -> list[int]:
        return [int(size) for size in self.sizes]

    def unbiased(self) -> float:
        n, m = self.n, int(self.sizes.sum())
        within = self.xx / (n * (n - 1)) + float(self.yy.sum()) / (m * (m - 1))
        return within - 2.0 * float(self.xy.sum()) / (n * m)

    def biased(self) -> float:
        """For a kernel whose diagonal is 0, as that of k - 1 is."""
        n, m = self.n, int(self.sizes.sum())
        return self.xx / n**2 + float(self.yy.sum()) / m**2 - 2.0 * float(self.xy.sum()) / (n * m)

    def deletions(self) -> list[_Sums]:
        """What is left without each block; the reference stays."""
        return [self._without(np.arange(len(self.sizes)) != g) for g in range(len(self.sizes))]

    def _without(self, kept: np.ndarray) -> _Sums:
        return _Sums(self.n, self.sizes[kept], self.xx, self.xy[kept], self.yy[np.ix_(kept, kept)])


def _sums(kernel: Kernel, x: np.ndarray, y: np.ndarray, group: int) -> _Sums:
    _require_comparable(x, y)
    blocks = index_blocks(len(y), BLOCKS, group)
    runs = [(g, part) for g, block in enumerate(blocks) for part in _tiles(int(block[0]), len(block))]
    x_tiles = _tiles(0, len(x))
    xx, xy, yy = 0.0, np.zeros(len(blocks)), np.zeros((len(blocks), len(blocks)))
    for i, rows in enumerate(x_tiles):
        mine = finite_rows(x[rows], first_row=rows.start)
        xx += _off_diagonal(kernel(mine, mine))
        xx += 2.0 * sum(float(kernel(mine, _rows(x, other)).sum()) for other in x_tiles[i + 1 :])
        for g, part in runs:
            xy[g] += float(kernel(mine, _rows(y, part)).sum())
    for i, (g, rows) in enumerate(runs):
        mine = finite_rows(y[rows], first_row=rows.start)
        yy[g, g] += _off_diagonal(kernel(mine, mine))
        for h, other in runs[i + 1 :]:
            total = float(kernel(mine, _rows(y, other)).sum())
            yy[g, h] += total
            yy[h, g] += total
    return _Sums(len(x), np.array([len(block) for block in blocks]), xx, xy, yy)


def _drawn(
    x: np.ndarray, y: np.ndarray, block_of: np.ndarray, size: int, generator: np.random.RandomState
) -> _Sums:
    """The sums of one subset; y is drawn first."""
    fake = generator.choice(len(y), size, replace=False)
    real = generator.choice(len(x), size, replace=False)
    mine, theirs = finite_rows(y[fake]), finite_rows(x[real])
    member = (block_of[fake][:, None] == np.arange(block_of[-1] + 1)).astype(np.float64)  # (size, G)
    own = _cubic(mine, mine)
    np.fill_diagonal(own, 0.0)
    return _Sums(
        size,
        member.sum(axis=0),
        _off_diagonal(_cubic(theirs, theirs)),
        member.T @ _cubic(mine, theirs).sum(axis=1),
        member.T @ own @ member,
    )


def _require_comparable(x: np.ndarray, y: np.ndarray) -> None:
    for features in (x, y):
        for rows in _tiles(0, max(len(features), 1)):
            finite_rows(features[rows], first_row=rows.start)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of width {x.shape[1]} and {y.shape[1]} have no distance: use one extractor"
        )
    if len(x) < 2 or len(y) < 3:
        raise ValueError(
            f"an unbiased MMD needs at least 2 samples on each side and its interval 3 generated ones, got {len(x)} and {len(y)}"
        )


def _gaussian_minus_one(sigma: float) -> Kernel:
    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2.0 * (x @ y.T)
        return np.expm1(-np.maximum(squared, 0.0) / (2.0 * sigma**2))

    return kernel


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base


def _off_diagonal(square: np.ndarray) -> float:
    np.fill_diagonal(square, 0.0)
    return float(square.sum())


def _rows(features: np.ndarray, rows: slice) -> np.ndarray:
    return np.asarray(features[rows], dtype=np.float64)


def _tiles(start: int, count: int) -> list[slice]:
    stop = start + count
    return [slice(at, min(at + _TILE, stop)) for at in range(start, stop, _TILE)]
