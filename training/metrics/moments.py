"""Mean and covariance of features, kept so that the bits do not depend on how the work was split.

Rows are cut into fixed blocks of 256 global indices. Blocks are merged by the pairwise rule of Chan, Golub & LeVeque
(1979, "Updating formulae and a pairwise algorithm for computing sample variances") in a binary tree whose shape is a
function of the number of blocks alone. Workers that own whole blocks may compute them anywhere: merging all blocks in
the order of their indices gives the same bits.

Legend: N samples, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 256
"""Global indices per block. Changing it changes the last bits of every Fréchet distance."""
RUN = 16 * BLOCK
"""Rows that one worker merges alone: a power of two of blocks, so a run is a subtree and its split changes no bit."""

Span = tuple[int, int]
"""First row, and the row after the last."""
Accumulate = Callable[[np.ndarray, Sequence[Span]], Iterator["Moments"]]
"""The moments of each span of features (N, D), in order: `accumulate_here`, or the same on other machines."""


@dataclass(frozen=True, eq=False, slots=True)
class Moments:
    """Count, mean and centred second moment of `n` feature rows."""

    n: int
    mean: np.ndarray
    """(D,) float64."""
    m2: np.ndarray
    """(D, D) float64: the sum over rows of the outer products of (row - mean)."""

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, divided by n - 1. Raises ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        return self.m2 / (self.n - 1)


def moments_of(features: np.ndarray, *, first_row: int = 0) -> Moments:
    """The moments of `features` (N, D), row i having global index `first_row` + i. Raises ValueError as `block_moments` does."""
    starts = range(0, max(len(features), 1), BLOCK)
    return merge(block_moments(features[at : at + BLOCK], first_row=first_row + at) for at in starts)


def accumulate_here(features: np.ndarray, spans: Sequence[Span]) -> Iterator[Moments]:
    """The moments of each span of `features`, one after the other, in this process."""
    return (moments_of(features[start:stop], first_row=start) for start, stop in spans)


def runs(num_rows: int) -> list[Span]:
    """Spans whose moments `merge` into those of all rows, bit for bit what `moments_of` gives."""
    return [(start, min(start + RUN, num_rows)) for start in range(0, max(num_rows, 1), RUN)]


def block_moments(features_block: np.ndarray, *, first_row: int = 0) -> Moments:
    """The moments of one block (at most 256 rows, D) by two passes in float64.

    `first_row` is the block's first global index, for messages. Raises ValueError for an empty or over-long block and
    for rows that are not finite.
    """
    rows = finite_rows(features_block, first_row=first_row)
    if len(rows) > BLOCK:
        raise ValueError(f"a block holds at most {BLOCK} rows, got {len(rows)}: use moments_of for more")
    mean = rows.mean(axis=0)
    rows -= mean
    return Moments(n=len(rows), mean=mean, m2=rows.T @ rows)


def merge(blocks: Iterable[Moments]) -> Moments:
    """The moments of all rows of `blocks`, which come in the order of their global indices.

    The tree's subtrees cover aligned runs of 2**k blocks, so a generator is consumed with at most log2(blocks) + 1
    moments in memory. Raises ValueError for no block at all.
    """
    pending: list[tuple[int, Moments]] = []
    for block in blocks:
        level = 0
        while pending and pending[-1][0] == level:
            block = _merge_two(pending.pop()[1], block)
            level += 1
        pending.append((level, block))
    if not pending:
        raise ValueError("no moments to merge: at least one block of features is needed")
    merged = pending.pop()[1]
    while pending:
        merged = _merge_two(pending.pop()[1], merged)
    return merged


def without(whole: Moments, part: Moments) -> Moments:
    """The moments of the rows of `whole` that are not among those of `part`: Chan's rule solved for one side."""
    n = whole.n - part.n
    if n < 1:
        raise ValueError(f"removing {part.n} of {whole.n} samples leaves none")
    mean = whole.mean + (whole.mean - part.mean) * (part.n / n)
    delta = part.mean - mean
    m2 = whole.m2 - part.m2
    m2 -= np.outer(delta, delta * (n * part.n / whole.n))
    return Moments(n=n, mean=mean, m2=(m2 + m2.T) / 2)


def finite_rows(features: np.ndarray, *, first_row: int = 0) -> np.ndarray:
    """A fresh C-ordered float64 copy of `features` (N, D).

    Raises ValueError when it is not a non-empty matrix of floats, or names the first row that holds NaN or infinity.
    """
    if features.ndim != 2 or features.dtype.kind != "f" or 0 in features.shape:
        raise ValueError(
            f"features must be a non-empty float array (N, D), got {features.dtype} {features.shape}: "
            "extract features first and stack them one row per sample"
        )
    rows = np.array(features, dtype=np.float64, order="C")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(
            f"features of sample {first_row + int(bad[0])} hold NaN or infinity ({bad.size} such rows of {len(rows)}): "
            "a metric of them would mean nothing; look at that sample and at the network that embedded it"
        )
    return rows


def _merge_two(a: Moments, b: Moments) -> Moments:
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"cannot merge moments of width {len(a.mean)} and {len(b.mean)}: use one feature extractor"
        )
    n = a.n + b.n
    delta = b.mean - a.mean
    m2 = a.m2 + b.m2
    outer = np.outer(delta, delta)
    outer *= a.n * b.n / n
    m2 += outer
    return Moments(n=n, mean=a.mean + delta * (b.n / n), m2=m2)
