"""Duplicate pictures of a dataset: which rows repeat an earlier one, and shards without them.

The first occurrence in the order of the shards stays. A decision is a function of the hashes that the shards' parquet files
hold, so that deciding again, after a kill or when the dataset has grown, decides the same.

Legend: n rows of a shard, R rows of all shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from data.likeness import hash_values, near_duplicates

REASONS = ("duplicate_image", "near_duplicate_image")


@dataclass(frozen=True)
class Repeat:
    """A row that repeats the picture of an earlier one."""

    key: str
    reason: str
    first: str
    """Key of the row that stays."""


def repeats(tables: Sequence[pa.Table], max_distance: int | None) -> list[list[Repeat]]:
    """Of each shard's table (n rows: `key`, `status`, `error_class`, `sha256`, `phash`), the rows that repeat earlier ones.

    Equal originals have equal `sha256`. With `max_distance`, rows whose perceptual hashes differ in at most so many of
    their 64 bits from that of a row that stays are near-duplicates.
    """
    rows = pa.concat_tables(tables).combine_chunks().to_pydict() if tables else {}
    bounds = np.cumsum([0, *(len(table) for table in tables)])
    if not rows:
        return []
    usable = np.array(
        [s == "success" or e in REASONS for s, e in zip(rows["status"], rows["error_class"], strict=True)]
    )
    first = _exact(rows["sha256"], usable)
    found = {
        int(row): Repeat(rows["key"][row], REASONS[0], rows["key"][first[row]])
        for row in np.flatnonzero(first >= 0)
    }
    if max_distance is not None:
        kept = np.flatnonzero(usable & (first < 0))
        nearest = near_duplicates(hash_values([rows["phash"][row] for row in kept]), max_distance)
        for at in np.flatnonzero(nearest >= 0):
            row, original = int(kept[at]), int(kept[nearest[at]])
            found[row] = Repeat(rows["key"][row], REASONS[1], rows["key"][original])
    return [[found[row] for row in range(low, high) if row in found] for low, high in pairwise(bounds)]


def _exact(digests: Sequence[str | None], usable: np.ndarray) -> np.ndarray:
    """(R,) int64: the earliest usable row with the same digest, -1 where the row is that one or is not usable."""
    first = np.full(len(digests), -1, np.int64)
    seen: dict[str | None, int] = {}
    for row in np.flatnonzero(usable).tolist():
        original = seen.setdefault(digests[row], row)
        first[row] = original if original != row else -1
    return first
