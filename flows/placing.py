"""Which artifact a state of the data belongs to: one that it extends by new shards, or a new one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data import growth, storage
from data.config import fingerprint, result_fields
from data.errors import CorruptArtifact
from data.growth import Growth, KnownRows
from data.manifest import Snapshot, snapshots
from flows.graph import Node
from stages.contract import InputRef
from stages.shard import ShardStageConfig, again


@dataclass(frozen=True)
class Place:
    """Where an artifact lies, as what it is made, and what is new in it."""

    folder: str
    node: Node
    new_shards: int = 0
    reason: str = ""
    """Why an artifact that was complete is pending; empty for one that is new or up to date."""


@dataclass(frozen=True)
class _Candidate:
    """A snapshot whose written rows are all in the source."""

    made: Snapshot
    known: KnownRows
    change: Growth
    is_tip: bool
    """No snapshot in its folder has more shards: what is new can go behind them."""

    @property
    def is_complete(self) -> bool:
        return not len(self.change.new) and not len(self.change.superseded)


def of_shards(node: Node, root: str) -> Place:
    """The place of the shards: the artifact of the same rules that has these rows, or the most of them, else a new one."""
    config = node.config
    assert isinstance(config, ShardStageConfig)
    stage = storage.join(root, "store", node.name)
    family = fingerprint(node.name, node.stage.version, result_fields(config.shard))
    new = Place(storage.join(stage, f"{family}-{config.source_digest}"), _with(node, retry_failed=False))
    if node.identities is None:
        return new
    found = list(_candidates(stage, family, node.identities, config.source.path))
    tips = [c for c in found if c.is_tip]
    if config.retry_failed and (retried := _retried(tips, node.identities)):
        return _extended(node, *retried)
    if complete := [c for c in found if c.is_complete]:
        recorded = {
            name: complete[-1].made.config[name] for name in ("source_digest", "after", "retry_failed")
        }
        return Place(complete[-1].made.folder, _with(node, **recorded))
    return _extended(node, _largest(tips)) if tips else new


def of_columns(node: Node, root: str, inputs: Mapping[str, InputRef], data: Place) -> Place:
    """The place of row-aligned columns: named by what encodes and by the artifact of the shards, not by its state."""
    others = {role: ref.fingerprint for role, ref in inputs.items() if role != "data"}
    lineage = PurePosixPath(data.folder).name
    name = fingerprint(node.name, node.stage.version, result_fields(node.config), others, lineage)
    folder = storage.join(root, "store", node.name, name)
    reason = f"{_count(data.new_shards, 'new shard')}" if data.new_shards else ""
    return Place(folder, node, data.new_shards, reason)


def _candidates(stage: str, family: str, identities: np.ndarray, source: str | None) -> Iterator[_Candidate]:
    """Raises CorruptArtifact where damage hides whether this source was sharded already: it would be sharded anew."""
    for name in storage.list_folders(stage):
        if not name.startswith(f"{family}-"):
            continue
        with _told_what_to_do(storage.join(stage, name)):
            made = sorted(snapshots(storage.join(stage, name)), key=lambda s: (len(s.shards), s.created))
        for snapshot in made:
            known = _known(snapshot, source)
            change = growth.growth(known, identities) if known else None
            if known and change:
                yield _Candidate(snapshot, known, change, snapshot is made[-1])


def _retried(tips: Sequence[_Candidate], identities: np.ndarray) -> tuple[_Candidate, int] | None:
    """The tip to extend, with those rows that may be attempted again among what is new, and how many of them there are.

    One that has all rows of the source where there is any, else the largest. None where there is no row to attempt again.
    """
    complete = [tip for tip in tips if tip.is_complete]
    for tip in complete or ([_largest(tips)] if tips else []):
        change = growth.growth(tip.known, identities, again(tip.known))
        assert change is not None
        if retried := len(change.new) - len(tip.change.new):
            return replace(tip, change=change), retried
    return None


def _largest(tips: Sequence[_Candidate]) -> _Candidate:
    return max(tips, key=lambda tip: len(tip.known.rows))


def _extended(node: Node, tip: _Candidate, retried: int = 0) -> Place:
    """The place of what comes behind `tip`: new rows, and `retried` others that failed."""
    rows = len(tip.change.new)
    shards = ceil(rows / node.config.shard.samples_per_shard)
    what = _count(rows - retried, "new row")
    if retried == rows:
        what = f"{_count(rows, 'failed row')} {'is' if rows == 1 else 'are'} attempted again"
    elif retried:
        what += f" and {_count(retried, 'failed row')}, attempted again,"
    after = _with(node, after=tip.made.fingerprint, retry_failed=bool(retried))
    return Place(tip.made.folder, after, shards, f"{what} in {_count(shards, 'new shard')}")


def _with(node: Node, **changes: Any) -> Node:
    return replace(node, config=node.config.model_copy(update=changes))


def _known(snapshot: Snapshot, source: str | None) -> KnownRows | None:
    """The snapshot's rows; None where they are lost and were not those of `source`."""
    try:
        with _told_what_to_do(snapshot.folder):
            return growth.load(snapshot)
    except CorruptArtifact:
        if (snapshot.facts.get("source") or {}).get("path") == source:
            raise
        return None


@contextmanager
def _told_what_to_do(folder: str) -> Iterator[None]:
    try:
        yield
    except CorruptArtifact as error:
        raise CorruptArtifact(
            f"{error}; so it is not known which rows {folder} has: run `darkroom verify {folder} --repair`, or remove it"
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
