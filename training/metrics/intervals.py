"""95 % intervals of metrics. All are functions of the data alone: no resampling, no random numbers.

The jackknife deletes one block of consecutive global indices at a time; the blocks depend on the number of samples only, and
on how many of them belong together: `group` consecutive ones, such as the pictures of one prompt, always share a block, since
they are alike and would make an interval too narrow.

Legend: N samples, G blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from pydantic import model_validator
from scipy import special

from data.config import Config
from training.metrics.frechet import Diagnostics, Gaussian, frechet_distance
from training.metrics.moments import Accumulate, Moments, accumulate_here, merge, runs, without

MAX_BLOCKS = 32
_Z = float(special.ndtri(0.975))


class Deletions(Config):
    """A statistic without each block of consecutive samples. Two sets of images of one length have the same blocks, so the
    deletions of a difference are the differences of deletions."""

    sizes: tuple[int, ...]
    values: tuple[float, ...]

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.sizes) != len(self.values):
            raise ValueError(f"{len(self.sizes)} blocks and {len(self.values)} values: give one for each")
        return self

    def interval(self, full: float) -> tuple[float, float]:
        """(low, high) around `full`, the statistic of all samples."""
        return deleted_interval(full, self.values, list(self.sizes))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic over generated samples; the real ones are fixed."""

    value: float
    deletions: Deletions
    diagnostics: Diagnostics | None = None
    """Of a Fréchet distance."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return self.deletions.interval(self.value)

    @classmethod
    def of(cls, value: float, deleted: Iterable[float], blocks: Iterable[Sized]) -> Estimate:
        """`value`, and what it is without each of `blocks`."""
        sizes = tuple(len(block) for block in blocks)
        return cls(value, Deletions(sizes=sizes, values=tuple(map(float, deleted))))

    @classmethod
    def of_mean(cls, values: np.ndarray, *, max_blocks: int = MAX_BLOCKS, group: int = 1) -> Estimate:
        """The mean of `values` (N,). Raises ValueError for one that is not finite, and for fewer than two."""
        values = _finite(values)
        blocks = index_blocks(len(values), max_blocks, group)
        total, n = float(values.sum()), len(values)
        deleted = [(total - float(values[block].sum())) / (n - len(block)) for block in blocks]
        return cls.of(total / n, deleted, blocks)


def index_blocks(num_samples: int, max_blocks: int = MAX_BLOCKS, group: int = 1) -> list[np.ndarray]:
    """The indices 0 to N - 1 in order, cut into min(N / group, max_blocks) runs of whole groups, whose lengths differ by at
    most one group. A single group is cut between its samples: its interval tells the spread within it.

    Raises ValueError for fewer than two samples or blocks, which have no spread, and for an N that `group` does not divide.
    """
    if min(num_samples, max_blocks) < 2:
        raise ValueError(
            f"an interval needs at least 2 samples and 2 blocks, got {num_samples} and {max_blocks}"
        )
    count, rest = divmod(num_samples, group)
    if rest:
        raise ValueError(f"{num_samples} samples are no whole number of groups of {group}")
    count, group = (count, group) if count > 1 else (num_samples, 1)
    groups = np.arange(num_samples).reshape(count, group)
    return [block.reshape(-1) for block in np.array_split(groups, min(count, max_blocks))]


def jackknife_interval(
    statistic: Callable[[list[int]], float], num_samples: int, *, max_blocks: int = MAX_BLOCKS
) -> tuple[float, float]:
    """(low, high) around `statistic` of all indices; `statistic` takes the kept indices, in order, and is called G + 1 times."""
    blocks = index_blocks(num_samples, max_blocks)
    everything = np.arange(num_samples)
    deleted = (statistic(np.setdiff1d(everything, block).tolist()) for block in blocks)
    return deleted_interval(statistic(everything.tolist()), deleted, [len(block) for block in blocks])


def mean_interval(values: np.ndarray, *, max_blocks: int = MAX_BLOCKS) -> tuple[float, float]:
    """(low, high) around the mean of `values` (N,): what `jackknife_interval` gives for a mean, in closed form.

    With max_blocks >= N it is Student's interval.
    """
    values = _finite(values)
    blocks = index_blocks(len(values), max_blocks)
    mean = float(values.mean())
    deviations = [float(values[block].mean()) - mean for block in blocks]
    return _interval(mean, deviations, [len(block) for block in blocks])


def frechet_estimate(
    reference: Moments | Gaussian,
    features: np.ndarray,
    *,
    max_blocks: int = MAX_BLOCKS,
    group: int = 1,
    accumulate: Accumulate = accumulate_here,
) -> Estimate:
    """The Fréchet distance of `features` (N, D) from a fixed `reference`, and its deletions.

    Each deletion subtracts one block's moments from the whole, so the features are read twice, not G times. The interval
    tells the spread over generated samples at this N; the bias of order 1/N stays, so compare only equal N.
    """
    if len(features) < 3:
        raise ValueError(
            f"its interval leaves samples out, so it needs at least 3 of them, got {len(features)}"
        )
    blocks = index_blocks(len(features), max_blocks, group)
    reference = Gaussian.of(reference) if isinstance(reference, Moments) else reference
    few = len(features) <= features.shape[1]
    spans = runs(len(features))
    found = accumulate(features, [*spans, *((int(b[0]), int(b[-1]) + 1) for b in blocks)])
    whole = merge(itertools.islice(found, len(spans)))
    everyone = Gaussian.of(whole)
    full = frechet_distance(reference, replace(everyone, rows=features) if few else everyone)
    deleted = []
    for block, part in zip(blocks, found, strict=True):
        rest = Gaussian.of(without(whole, part))
        if few:
            rest = replace(rest, rows=np.delete(features, block, axis=0))
        deleted.append(frechet_distance(reference, rest, exact=False).value)
    return replace(Estimate.of(full.value, deleted, blocks), diagnostics=full.diagnostics)


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """(low, high) in [0, 1] for a proportion (Wilson 1927; Brown, Cai & DasGupta 2001, eq. 4): sound at 0 and at 1 too."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(
            f"{successes} successes of {trials} trials: give 0 <= successes <= trials, and at least one trial"
        )
    share = successes / trials
    shrink = 1.0 + _Z**2 / trials
    centre = (share + _Z**2 / (2 * trials)) / shrink
    half = _Z / shrink * math.sqrt(share * (1.0 - share) / trials + _Z**2 / (4 * trials**2))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def share_interval(right: np.ndarray, *, group: int = 1) -> tuple[float, float]:
    """(low, high) in [0, 1] for the share of `right` (N,), ones and zeros: Wilson's interval or the jackknife's over blocks,
    at each end the one that reaches further. Wilson's is sound at 0 and at 1, where the jackknife has no width; a group counts
    as one trial, since its samples may be all alike."""
    groups = max(len(right) // group, 1)
    low, high = wilson_interval(float(right.mean()) * groups, groups)
    if len(right) < 2:
        return low, high
    low_of_blocks, high_of_blocks = Estimate.of_mean(right, group=group).interval
    return max(min(low, low_of_blocks), 0.0), min(max(high, high_of_blocks), 1.0)


def deleted_interval(full: float, deleted: Iterable[float], sizes: list[int]) -> tuple[float, float]:
    """(low, high) around `full` from the values that are left without each block; `sizes` are those of the blocks.

    Delete-a-block jackknife for blocks of unequal size m_j (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for
    unequal m").
    """
    n = sum(sizes)
    without_block = list(deleted)
    estimate = len(sizes) * full - sum(
        (1.0 - m / n) * value for m, value in zip(sizes, without_block, strict=True)
    )
    pairs = zip(sizes, without_block, strict=True)
    pseudovalues = [n / m * full - (n / m - 1.0) * value for m, value in pairs]
    return _interval(full, [value - estimate for value in pseudovalues], sizes)


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"value {int(np.flatnonzero(~np.isfinite(values))[0])} of {len(values)} is NaN or infinite"
        )
    return values


def _interval(centre: float, deviations: list[float], sizes: list[int]) -> tuple[float, float]:
    n, num_blocks = sum(sizes), len(sizes)
    pairs = zip(deviations, sizes, strict=True)
    variance = sum(deviation**2 / (n / m - 1.0) for deviation, m in pairs) / num_blocks
    half = float(special.stdtrit(num_blocks - 1, 0.975)) * math.sqrt(variance)
    return centre - half, centre + half
