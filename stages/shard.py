"""Source rows -> WebDataset shards with a ledger of every attempted row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from data import sources, storage
from data.config import Config
from data.errors import StageFailed, UserError
from data.manifest import FileRecord, Ledger, ShardRecord, Snapshot, file_record
from data.shards import ShardConfig, write_shard
from data.sources import Row, SourceConfig
from stages import prompts
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards


class ShardStageConfig(Config):
    """What is sharded, and how."""

    source: SourceConfig
    source_digest: str
    """Content of the source when the plan was made."""
    shard: ShardConfig


def run(config: ShardStageConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Writes every shard, checks `max_failed_fraction`, and commits. Shard i holds rows [i*n, (i+1)*n) of the source."""
    started = time.monotonic()
    scratch = storage.join(workspace.folder, "_source")
    source = (
        sources.materialise(config.source, storage.local_path(scratch))
        if storage.is_local(scratch)
        else config.source
    )
    rows = sources.list_rows(source)
    size = config.shard.samples_per_shard
    tasks = [
        ShardTask(index, chunk, {"source": config.source_digest}, len(chunk))
        for index, chunk in enumerate(rows[at : at + size] for at in range(0, len(rows), size))
    ]
    records = map_shards(ShardWriting, {"config": config.shard}, tasks, workspace)
    _check_failures(config, records, workspace.folder)
    files = _carry_prompts(source, workspace.folder)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files)


@dataclass(frozen=True)
class ShardWriting:
    """The per-shard function: rows in, one shard out."""

    config: ShardConfig

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        rows: Sequence[Row] = task.payload
        record = write_shard(rows, task.index, folder, self.config)
        return record.model_copy(update={"parents": dict(task.parents)})


def _check_failures(config: ShardStageConfig, records: Sequence[ShardRecord], folder: str) -> None:
    ledger = sum((record.ledger for record in records), Ledger())
    failed = sum(ledger.failed.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in {**ledger.failed, **ledger.filtered}.items())
    if ledger.written == 0:
        raise UserError(f"none of the {ledger.attempted} rows of {_name(config)} can be used: {reasons}")
    if failed > config.shard.max_failed_fraction * ledger.attempted:
        shown = "; ".join(f"row {row}: {why}" for row, why in _failed_rows(folder, records, limit=5))
        raise StageFailed(
            f"{failed} of {ledger.attempted} rows failed ({reasons}), more than shard.max_failed_fraction="
            f"{config.shard.max_failed_fraction}: {shown}. Mend them, or raise the limit with --set shard.max_failed_fraction=…"
        )


def _failed_rows(folder: str, records: Sequence[ShardRecord], *, limit: int) -> Iterator[tuple[str, str]]:
    """(source id, message) of the first rows that failed."""
    for record in records:
        if not record.ledger.failed or limit <= 0:
            continue
        with storage.open_read(storage.join(folder, f"{record.index:05d}.parquet")) as stream:
            rows = pq.read_table(stream, columns=["source_id", "status", "error_message"]).to_pylist()
        failed = [row for row in rows if row["status"].startswith("failed")][:limit]
        limit -= len(failed)
        yield from ((row["source_id"], row["error_message"]) for row in failed)


def _carry_prompts(source: SourceConfig, folder: str) -> tuple[FileRecord, ...]:
    listed = sources.prompts(source)
    if not listed:
        return ()
    prompts.write_prompts(folder, listed)
    return (file_record(folder, prompts.FILE),)


def _name(config: ShardStageConfig) -> str:
    return config.source.path or config.source.kind


STAGE = Stage(
    name="shard",
    version=1,
    reads=lambda _: frozenset(),
    writes=lambda _: frozenset({"image", "caption"}),
    config=ShardStageConfig,
    run=run,
)
