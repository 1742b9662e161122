"""Shards once more, as they were: which rows they held, what is known of those that were not written, which were repeats.

A row that was written is read from the source again. What became of any other is taken from the shard's parquet where that
can be read: its file may be mended by now, or gone, and was part of no tar.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import growth, sources, storage
from data.checksums import checksum
from data.duplicates import Repeat, repeats
from data.errors import CorruptArtifact
from data.growth import WRITTEN, KnownRows
from data.manifest import ShardRecord, Snapshot, load_snapshot
from data.rows import Row, defective
from data.shards import ShardConfig, settle_shard, write_shard
from data.sources import SourceConfig
from stages.fanout import ShardTask
from stages.shard import identity_after, outcomes_of

_DRAFT = "draft"


@dataclass(frozen=True)
class ShardRewriting:
    """The per-shard function: rows, and the lines of those that were not written, in; one shard out."""

    config: ShardConfig

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        rows, recorded = task.payload
        record = write_shard(rows, task.index, folder, self.config, recorded)
        return record.model_copy(update={"parents": dict(task.parents)})


def rewrites(
    snapshot: Snapshot, source: SourceConfig, rows: Sequence[Row], wanted: Sequence[ShardRecord]
) -> Iterator[ShardTask]:
    """Each wanted shard's rows as the source has them now, found by identity, whatever their order became.

    Raises CorruptArtifact where a row that was written is not there any more.
    """
    starts = np.cumsum([0, *(shard.ledger.attempted for shard in snapshot.shards)])
    places = {shard.index: n for n, shard in enumerate(snapshot.shards)}
    if sources.is_builtin(source):
        known, by_identity = None, dict(enumerate(rows))
    else:
        known = growth.load(snapshot)
        by_identity = dict(zip(sources.row_identities(rows).tolist(), rows, strict=True))
    for shard in wanted:
        at = slice(starts[places[shard.index]], starts[places[shard.index] + 1])
        identities = np.arange(at.start, at.stop) if known is None else known.rows["identity"][at]
        written = np.full(len(identities), True) if known is None else known.rows["state"][at] == WRITTEN
        pairs = list(zip(identities.tolist(), written.tolist(), strict=True))
        lost = sum(identity not in by_identity for identity, was_written in pairs if was_written)
        if lost:
            where = source.path or source.kind
            told = f"{lost} of the {len(pairs)} rows of shard {shard.index:05d} are gone from {where}"
            raise CorruptArtifact(told)
        chosen = [by_identity.get(identity) or _GONE for identity, _ in pairs]
        lines = _lines(snapshot.folder, shard) or []
        recorded = {line["key"]: line for line in lines if line["status"] != "success"}
        yield ShardTask(shard.index, (chosen, recorded), dict(shard.parents), len(chosen))


def without_repeats(
    snapshot: Snapshot, staging: str, made: Sequence[ShardRecord], config: ShardConfig
) -> list[ShardRecord]:
    """The shards in `staging` without repeats of earlier pictures, decided anew for those whose own parquet is lost."""
    drafts = {record.index: record for record in made}
    lost = {s.index for s in snapshot.shards if s.index in drafts and _table(snapshot.folder, s) is None}
    if config.deduplicate == "no" or not lost:
        return list(made)
    tables = [
        _table(staging, drafts[shard.index]) if shard.index in lost else _table(snapshot.folder, shard)
        for shard in snapshot.shards
    ]
    if missing := [s.index for s, t in zip(snapshot.shards, tables, strict=True) if t is None]:
        raise CorruptArtifact(
            f"the parquet of shard {missing[0]:05d}, which tells the repeats, cannot be read"
        )
    distance = config.near_distance if config.deduplicate == "near" else None
    found = repeats([table for table in tables if table is not None], distance)
    dropped = dict(zip((shard.index for shard in snapshot.shards), found, strict=True))
    return [
        _settled(staging, record, dropped[record.index]) if record.index in lost else record
        for record in made
    ]


def relist(snapshot: Snapshot, states: Sequence[Snapshot], rows: Sequence[Row]) -> None:
    """Writes the snapshot's lost list of rows anew: from a later one of the artifact's `states`, else from its shards and
    the `rows` of the source.

    Raises CorruptArtifact when it does not come out as recorded: the source changed since.
    """
    before = load_snapshot(snapshot.folder, snapshot.config["after"]) if snapshot.config["after"] else None
    path = growth.rows_path(snapshot.fingerprint)
    (was,) = [file for file in snapshot.files if file.path == path]
    for payload in _candidates(snapshot, before, states, rows):
        if checksum(payload).sha256 == was.sha256:
            storage.write_bytes(storage.join(snapshot.folder, path), payload)
            return
    raise CorruptArtifact("the list of rows was made again, but came out differently: the source changed")


def _candidates(
    snapshot: Snapshot, before: Snapshot | None, states: Sequence[Snapshot], rows: Sequence[Row]
) -> Iterator[bytes]:
    """What the list may have been; its digest tells."""
    attempted = sum(shard.ledger.attempted for shard in snapshot.shards)
    earlier = sum(shard.ledger.attempted for shard in before.shards) if before else 0
    for later in states:
        path = storage.join(later.folder, growth.rows_path(later.fingerprint))
        if len(later.shards) > len(snapshot.shards) and storage.exists(path):
            listed = growth.load(later).rows[:attempted]
            listed["superseded"][earlier:] = False
            yield growth.encoded(KnownRows(listed, ()))
    known = growth.load(before) if before else growth.nothing_known()
    by_id: dict[str, list[Row]] = defaultdict(list)
    for row in reversed(rows):
        by_id[row.source_id].append(row)
    own = snapshot.shards[len(before.shards) if before else 0 :]
    yield growth.encoded(_relisted(snapshot.folder, known, own, sources.row_identities(rows), by_id))


def _relisted(
    folder: str,
    known: KnownRows,
    own: Sequence[ShardRecord],
    source: np.ndarray,
    by_id: dict[str, list[Row]],
) -> KnownRows:
    added, outcomes = [], []
    for shard in own:
        lines = _lines(folder, shard)
        if lines is None:
            raise CorruptArtifact(
                f"the list of rows is lost, and so is the parquet of shard {shard.index:05d}"
            )
        for line, outcome in zip(lines, found := list(outcomes_of(folder, shard)), strict=True):
            if not by_id.get(line["source_id"]):
                raise CorruptArtifact(
                    f"the list of rows is lost, and {line['source_id']} is gone from the source"
                )
            added.append(identity_after(by_id[line["source_id"]].pop(), *outcome))
        outcomes += found
    return growth.rebuilt(known, source, np.array(added, np.uint64), outcomes)


_GONE = defective(0, "", "missing_image", "the source names it no more")
"""Stands for a row that was not written and that its source has no more: the shard's parquet tells of it."""


def _settled(staging: str, record: ShardRecord, dropped: Sequence[Repeat]) -> ShardRecord:
    draft = storage.join(staging, _DRAFT)
    for file in record.files:
        storage.write_bytes(
            storage.join(draft, file.path), storage.read_bytes(storage.join(staging, file.path))
        )
    return settle_shard(draft, staging, record.index, dropped)


def _lines(folder: str, shard: ShardRecord) -> list[dict[str, Any]] | None:
    table = _table(folder, shard)
    return None if table is None else table.to_pylist()


def _table(folder: str, shard: ShardRecord) -> pa.Table | None:
    """The shard's parquet under `folder`; None unless it is as the shard's record says."""
    file = shard.file(f"{shard.index:05d}.parquet")
    try:
        payload = storage.read_bytes(storage.join(folder, file.path))
    except OSError:
        return None
    return pq.read_table(pa.BufferReader(payload)) if checksum(payload).sha256 == file.sha256 else None
