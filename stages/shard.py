"""Source rows -> WebDataset shards with a ledger of every attempted row; a source that grew gets new shards behind the old."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from data import growth, sources, storage
from data.config import Config, fingerprint, operational
from data.duplicates import repeats
from data.errors import CorruptArtifact, StageFailed
from data.growth import FAILED, FILTERED, WRITTEN, Growth, KnownRows
from data.manifest import FileRecord, ShardRecord, Snapshot, file_record, load_snapshot, snapshots
from data.originals import MISSING, is_retryable
from data.rows import Cell
from data.shards import ShardConfig, settle_shard, write_shard
from data.sources import Row, SourceConfig
from stages import logs, prompts
from stages.contract import Inputs, Stage, Workspace, commit
from stages.failures import check_failures, table_of
from stages.fanout import ShardTask, map_shards

DRAFTS = "_drafts"
"""Where shards lie between the two passes of a run that filters duplicates; gone when its snapshot is there."""


class ShardStageConfig(Config):
    """What is sharded, and how."""

    source: SourceConfig = operational(
        SourceConfig(), description="where the rows are; their content is in the digest"
    )
    source_digest: str = Field(description="content of the source when the plan was made")
    shard: ShardConfig
    after: str = Field("", description="fingerprint of the snapshot whose shards come first; empty: none")
    retry_failed: bool = Field(False, description="attempt again what failed for a reason that may pass")


@dataclass(frozen=True, eq=False)
class Extent:
    """What is there already, and which rows of the source come behind it."""

    before: Snapshot | None
    known: KnownRows
    change: Growth
    rows: list[Row]
    identities: np.ndarray

    @property
    def shards(self) -> tuple[ShardRecord, ...]:
        """The shards that stay as they are."""
        return self.before.shards if self.before else ()


def run(config: ShardStageConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Writes every new shard, checks `max_failed_fraction`, and commits.

    Without `after`, shard i holds rows [i*n, (i+1)*n) of the source; with it, rows that its snapshot does not know fill
    further shards in the same way, and its own shards stay as they are.
    """
    started = time.monotonic()
    workspace = workspace.without_gpus
    source = _materialised(config.source, workspace.folder)
    extent = _extent(config, source, workspace.folder)
    tasks = _tasks(config, extent)
    if config.shard.deduplicate == "no":
        made = map_shards(ShardWriting, {"config": config.shard}, tasks, workspace)
    else:
        made = _without_repeats(config, extent, tasks, workspace)
    outcomes = [outcome for record in made for outcome in outcomes_of(workspace.folder, record)]
    identities = extent.identities.copy()
    for position, (state, reason) in zip(extent.change.new, outcomes, strict=True):
        if state == FAILED:
            identities[position] = identity_after(extent.rows[position], state, reason)
    known = growth.grown(extent.known, extent.change, identities, outcomes)
    shards = (*extent.shards, *made)
    name = config.source.path or config.source.kind
    check_failures(name, config.shard.max_failed_fraction, shards, made, known.superseded, workspace.folder)
    files = _carry_prompts(source, workspace.folder)
    if not sources.is_builtin(
        config.source
    ):  # a built-in dataset never grows, and its files' times mean nothing
        files = (*files, growth.save(workspace.folder, workspace.fingerprint, known))
    snapshot = commit(
        STAGE,
        config,
        inputs,
        workspace,
        started=started,
        shards=shards,
        files=files,
        superseded=known.superseded,
        facts={"reasons": list(known.reasons), "source": config.source.model_dump(mode="json")},
    )
    storage.remove_tree(storage.join(workspace.folder, DRAFTS))
    return snapshot


def identity_after(row: Row, state: int, reason: str) -> int:
    """The identity under which an attempted row is known: that of the listing, unless its picture had vanished by then.

    A place that the listing found filled was empty: filled again, be it with the same file, it is another row.
    """
    vanished = (state, reason) == (FAILED, MISSING) and not isinstance(row.within, Cell)
    return sources.row_identity(replace(row, stamp=None) if vanished else row)


def again(known: KnownRows) -> np.ndarray:
    """Positions of the known rows that `retry_failed` attempts anew: they failed for a reason that may pass."""
    return known.of_reasons({reason for reason in known.reasons if is_retryable(reason)})


def _materialised(source: SourceConfig, folder: str) -> SourceConfig:
    """The source as files; a built-in one is drawn beside the shards, or on this machine when they lie elsewhere."""
    beside = storage.is_local(folder)
    home = (
        storage.local_path(folder) / "_source" if beside else Path(tempfile.gettempdir(), "darkroom-source")
    )
    return sources.materialise(source, home)


def _extent(config: ShardStageConfig, source: SourceConfig, folder: str) -> Extent:
    rows = sources.list_rows(source)
    identities = sources.row_identities(rows)
    if not sources.is_builtin(config.source) and sources.digest_of(identities) != config.source_digest:
        raise StageFailed(
            f"{config.source.path} changed while the run was starting; run the same command again"
        )
    before = load_snapshot(folder, config.after) if config.after else None
    if config.after and before is None:
        raise CorruptArtifact(f"{folder} has no snapshot {config.after}: run the same command again")
    if max((len(made.shards) for made in snapshots(folder)), default=0) > len(
        before.shards if before else ()
    ):
        raise StageFailed(f"{folder} grew while the run was starting; run the same command again")
    known = growth.load(before) if before else growth.nothing_known()
    change = growth.growth(known, identities, again(known) if config.retry_failed else ())
    assert change is not None, f"the plan extends {config.after}, whose rows are not all in the source"
    return Extent(before, known, change, rows, identities)


def _tasks(config: ShardStageConfig, extent: Extent) -> list[ShardTask]:
    size, first = config.shard.samples_per_shard, len(extent.shards)
    tasks = []
    for index, at in enumerate(range(0, len(extent.change.new), size), start=first):
        positions = extent.change.new[at : at + size]
        content = fingerprint(extent.identities[positions].tolist())
        if sources.is_builtin(config.source):
            content = fingerprint(config.source_digest, index)
        rows = [extent.rows[position] for position in positions]
        tasks.append(ShardTask(index, rows, {"source": content}, len(rows)))
    return tasks


def outcomes_of(folder: str, record: ShardRecord) -> Iterator[tuple[int, str]]:
    """(state, reason) of each row of a shard, in order."""
    if record.ledger.written == record.ledger.attempted:
        yield from [(WRITTEN, "")] * record.ledger.written
        return
    for row in table_of(folder, record, ["status", "error_class"]).to_pylist():
        failed = FAILED if row["status"].startswith("failed") else FILTERED
        yield (WRITTEN, "") if row["status"] == "success" else (failed, row["error_class"])


@dataclass(frozen=True)
class ShardWriting:
    """The per-shard function: rows in, one shard out."""

    config: ShardConfig

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        rows: Sequence[Row] = task.payload
        record = write_shard(rows, task.index, folder, self.config)
        return record.model_copy(update={"parents": dict(task.parents)})


class ShardSettling:
    """The per-shard function of the second pass: a draft without the pictures that earlier rows already have."""

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        record = settle_shard(storage.join(folder, DRAFTS), folder, task.index, task.payload)
        return record.model_copy(update={"parents": dict(task.parents)})


def _without_repeats(
    config: ShardStageConfig, extent: Extent, tasks: Sequence[ShardTask], workspace: Workspace
) -> tuple[ShardRecord, ...]:
    """The new shards without duplicates: written as drafts, then settled once all hashes are known.

    A receipt beside the drafts tells of the first pass, one beside the shards of the second, and names what it dropped:
    whenever this is killed, and whatever the source becomes meanwhile, no shard stands for another decision than its own.
    """
    drafts = storage.join(workspace.folder, DRAFTS)
    with logs.at(stage="shard drafts"):
        written = map_shards(ShardWriting, {"config": config.shard}, tasks, replace(workspace, folder=drafts))
    columns = ["key", "status", "error_class", "sha256", "phash"]
    tables = [table_of(workspace.folder, record, columns) for record in extent.shards]
    tables += [table_of(drafts, record, columns) for record in written]
    distance = config.shard.near_distance if config.shard.deduplicate == "near" else None
    found = repeats(tables, distance)[len(extent.shards) :]
    settling = [
        ShardTask(t.index, drop, {**t.parents, "repeats": fingerprint([r.key for r in drop])}, t.weight)
        for t, drop in zip(tasks, found, strict=True)
    ]
    return map_shards(ShardSettling, {}, settling, workspace)


def _carry_prompts(source: SourceConfig, folder: str) -> tuple[FileRecord, ...]:
    listed = sources.prompts(source)
    if not listed:
        return ()
    prompts.write_prompts(folder, listed)
    return (file_record(folder, prompts.FILE),)


STAGE = Stage(
    name="shard",
    version=2,
    reads=lambda _: frozenset(),
    writes=lambda _: frozenset({"image", "caption"}),
    config=ShardStageConfig,
    run=run,
    grows=True,
)
