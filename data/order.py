"""Which sample lies where: a function of numbers alone, with no table that grows with the dataset.

Hashes are SplitMix64's output function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def held_out(count: int, size: int) -> np.ndarray:
    """`size` of `count` indices (int64, ascending): one, at a hashed place, of each of `size` equal parts.

    A function of both numbers alone, so that every stage, seed and worker keeps the same samples out of training.
    """
    bounds = np.arange(size + 1, dtype=np.int64) * count // max(size, 1)
    widths = np.diff(bounds).astype(np.uint64)
    return bounds[:-1] + (mixed(np.arange(size, dtype=np.uint64)) % widths).astype(np.int64)


def mixed(z: np.ndarray) -> np.ndarray:
    """uint64 hashes of the uint64 numbers `z`; distinct for distinct numbers."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))
