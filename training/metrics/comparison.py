"""A against B: two evaluations under one protocol, and the interval of their difference over paired prompts and seeds.

A value keeps what it is without each of fixed blocks of consecutive images. Where two evaluations share prompts, seeds and
N, block j holds the same prompts and the same noise on both sides, so the jackknife of the difference sees only what the
models do differently.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from data.config import Config
from training.metrics.intervals import Deletions, deleted_interval
from training.metrics.protocol import SUBJECT, Protocol, differences
from training.metrics.scores import Score


class Measured(Score):
    """A score with the protocol that it was measured under, and what a paired comparison needs of it."""

    protocol: Protocol
    deletions: Deletions | None = None


class Difference(Config):
    """B's value less A's, with its 95 % interval where both have deletions over the same blocks."""

    value: float
    low: float | None = None
    high: float | None = None
    verdict: Literal["better", "worse", "undecided"] = "undecided"
    """Of B against A: `undecided` while the interval holds 0, or where there is none."""


def difference(a: Measured, b: Measured, *, ignoring: Collection[str] = SUBJECT) -> Difference:
    """How B differs from A. Raises ValueError, saying where, when their protocols differ in more than `ignoring`."""
    if apart := differences(a.protocol, b.protocol, ignoring=ignoring):
        raise ValueError(f"{a.name} was measured under two protocols: {'; '.join(apart)}")
    value = b.value - a.value
    if a.deletions is None or b.deletions is None or a.deletions.sizes != b.deletions.sizes:
        return Difference(value=value)
    deleted = [y - x for x, y in zip(a.deletions.values, b.deletions.values, strict=True)]
    low, high = deleted_interval(value, deleted, list(a.deletions.sizes))
    gained, lost = (low > 0, high < 0) if b.better == "higher" else (high < 0, low > 0)
    return Difference(
        value=value, low=low, high=high, verdict="better" if gained else "worse" if lost else "undecided"
    )
