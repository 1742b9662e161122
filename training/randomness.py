"""Per-sample randomness from a counter-based generator: a function of (seed, purpose, index), never of batch or world size.

Every sample owns an independent stream. Element j of sample i's stream is SplitMix64's output function
(Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators") at counter j of a key mixed from
(seed, purpose, i); normals come from Box-Muller. All on the index's device, with no state and no host sync.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    `index` (B,) int64 is what a sample's numbers depend on besides (seed, purpose): in training the global position in
    the stream of samples seen, in generation the prompt's index.
    """

    seed: int
    index: Tensor

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, uniform in [0, 1)."""
        return _unit(self._bits(purpose, math.prod(shape))).view(len(self.index), *shape)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal."""
        count = math.prod(shape)
        bits = self._bits(purpose, 2 * count).view(len(self.index), 2, count)
        radius = torch.sqrt(-2.0 * torch.log1p(-_unit(bits[:, 0])))
        return (radius * torch.cos(2 * math.pi * _unit(bits[:, 1]))).view(len(self.index), *shape)

    def integers(self, purpose: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) int64, uniform in [0, high)."""
        return (self.uniform(purpose, shape).double() * high).long().clamp_(max=high - 1)

    def _bits(self, purpose: str, count: int) -> Tensor:
        key = int.from_bytes(
            hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()[:8], "little", signed=True
        )
        streams = _mix(_mix(self.index + _signed(key)) + _signed(key * 3 + 1))  # (B,)
        counters = torch.arange(1, count + 1, device=self.index.device) * _GOLDEN  # (count,)
        return _mix(streams[:, None] + counters)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts are arithmetic: mask the copied sign bits


def _unit(bits: Tensor) -> Tensor:
    return _shift(bits, 40).float() * 2.0**-24


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
