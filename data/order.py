"""Which sample lies at which position of the stream: a function of numbers alone, with no table of samples.

A dataset is cut into blocks: runs of neighbouring samples of one shard. An epoch permutes the blocks, cuts the permuted
blocks into windows, and permutes the samples of each window. Hence what is read at any time lies in the few shards of a
window, and every sample comes exactly once, whatever the sizes. Memory is two numbers per block.

Permutations are Feistel networks on a rectangle (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 5)
with cycle walking; their round function is SplitMix64's output function (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators"). Neither depends on the release of a library, as numpy's shuffles do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError

BLOCK = 1 << 14
"""Most samples of a block: shards up to this size are read whole, one after another."""
WINDOW = 1 << 18
"""Samples that are permuted together, at least; datasets below twice this have a single window: a full shuffle."""
ROUNDS = 4
"""Of a permutation, each of both coordinates; thrice as many where it is small, since few rounds reach few permutations."""
TINY = 256
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ALL = (1 << 64) - 1


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of the integers below `size`; nothing is stored."""

    size: int
    key: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Where each of `x` (int64, all below `size`) goes, int64."""
        y = self._network(x.astype(np.uint64))
        while (
            outside := y >= self.size
        ).any():  # fewer than width of width * height; each walks on to a place inside
            y[outside] = self._network(y[outside])
        return y.astype(np.int64)

    def _network(self, x: np.ndarray) -> np.ndarray:
        width = np.uint64(math.isqrt(self.size - 1) + 1)
        height = np.uint64(-(-self.size // int(width)))
        up, right = np.divmod(x, width)
        for key in _round_keys(self.key, ROUNDS if self.size > TINY else 3 * ROUNDS):
            right = _added(right, mixed(up ^ key), width)
            up = _added(up, mixed(right + key), height)
        return up * width + right


class SampleOrder:
    """The stream of samples of one seed: epoch after epoch, each a permutation of its own.

    `counts` are the samples of each shard, in order; sample i is the i-th of all. A function of (counts, seed) alone.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, seed: int, block: int = BLOCK, window: int = WINDOW
    ) -> None:
        self.seed = seed
        self.starts, self.shards = blocks(counts, block)
        self.count = int(self.starts[-1])
        self.windows = max(1, self.count // max(window, 1))
        self.windows = min(self.windows, len(self.shards))
        self._epoch = functools.lru_cache(maxsize=2)(self._permuted_blocks)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The samples (int64) at stream `positions` (int64); position p belongs to epoch p // count."""
        epochs, places = np.divmod(positions, self.count)
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = self._samples(epoch, places[inside])
        return found

    def near(self, position: int) -> tuple[list[int], list[int]]:
        """The shards of the window at stream `position`, and those of the window after it, each ascending."""
        epoch, place = divmod(position, self.count)
        ends = self._epoch(epoch)[1]
        window = int(self._window_of(np.searchsorted(ends, place, side="right") - 1))
        following = (epoch, window + 1) if window + 1 < self.windows else (epoch + 1, 0)
        return self._shards_of(epoch, window), self._shards_of(*following)

    def _samples(self, epoch: int, places: np.ndarray) -> np.ndarray:
        order, ends = self._epoch(epoch)
        windows = self._window_of(np.searchsorted(ends, places, side="right") - 1)
        shuffled = np.empty(len(places), np.int64)
        for window in np.unique(windows).tolist():
            inside = windows == window
            first, end = ends[self._first_slot(window)], ends[self._first_slot(window + 1)]
            permutation = Permutation(int(end - first), _key(self.seed, epoch, window + 1))
            shuffled[inside] = first + permutation(places[inside] - first)
        slots = np.searchsorted(ends, shuffled, side="right") - 1
        return self.starts[order[slots]] + shuffled - ends[slots]

    def _permuted_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of an epoch in their order, and where each begins in it (one more than there are blocks)."""
        number = len(self.shards)
        order = Permutation(number, _key(self.seed, epoch, 0))(np.arange(number))
        return order, np.concatenate([[0], np.cumsum(np.diff(self.starts)[order])])

    def _window_of(self, slot: Any) -> Any:
        return ((slot + 1) * self.windows - 1) // len(self.shards)

    def _first_slot(self, window: int) -> int:
        return len(self.shards) * window // self.windows

    def _shards_of(self, epoch: int, window: int) -> list[int]:
        slots = slice(self._first_slot(window), self._first_slot(window + 1))
        return np.unique(self.shards[self._epoch(epoch)[0][slots]]).tolist()


def blocks(counts: Sequence[int] | np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each shard cut into the fewest equal runs of at most `most` samples.

    Returns where each run begins, and at last the number of samples (int64), and the place in `counts` of its shard (int64).
    """
    sizes = np.asarray(counts, np.int64)
    parts = -(-sizes // most)
    shard = np.repeat(np.arange(len(sizes)), parts)
    part = np.arange(len(shard)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = np.repeat(np.cumsum(sizes) - sizes, parts) + sizes[shard] * part // parts[shard]
    return np.concatenate([begin, [sizes.sum()]]), shard


def held_out(count: int, size: int) -> np.ndarray:
    """`size` of `count` indices (int64, ascending): one, at a hashed place, of each of `size` equal parts.

    A function of both numbers alone, so that every stage, seed and worker keeps the same samples out of training.
    """
    bounds = np.arange(size + 1, dtype=np.int64) * count // max(size, 1)
    widths = np.diff(bounds).astype(np.uint64)
    return bounds[:-1] + (mixed(np.arange(size, dtype=np.uint64)) % widths).astype(np.int64)


def require_equal_shares(batch_size: int, world_size: int, name: str = "batch_size") -> None:
    """Raises UserError, naming sizes and numbers of workers that would work, unless every worker gets as many samples."""
    if batch_size % world_size:
        below = batch_size - batch_size % world_size
        sizes = " or ".join(str(size) for size in (below, below + world_size) if size)
        divisors = [str(w) for w in range(1, world_size + 1) if batch_size % w == 0]
        raise UserError(
            f"{name} {batch_size} is not a multiple of {world_size} workers: take a batch of {sizes}, "
            f"or {', '.join(divisors)} workers"
        )


def mixed(z: np.ndarray) -> np.ndarray:
    """uint64 hashes of the uint64 numbers `z`; distinct for distinct numbers."""
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _key(*parts: int) -> int:
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mixed(key ^ np.uint64(part & _ALL))
    return int(key[0])


def _added(value: np.ndarray, bits: np.ndarray, modulus: np.uint64) -> np.ndarray:
    """(value + a number below `modulus` made of `bits`) modulo `modulus`, which is below 2**32; without a division."""
    total = value + ((bits >> np.uint64(32)) * modulus >> np.uint64(32))
    return np.where(total >= modulus, total - modulus, total)


@functools.lru_cache(maxsize=64)
def _round_keys(key: int, rounds: int) -> tuple[np.uint64, ...]:
    return tuple(mixed(np.arange(1, rounds + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)))
