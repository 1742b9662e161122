"""How many rows of a dataset may fail, which did, and which shards are attempted anew after an outage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from data import manifest, storage
from data.errors import CorruptArtifact, StageFailed, UserError
from data.manifest import Ledger, ShardRecord
from data.originals import MISSING, is_retryable


def check_failures(
    name: str,
    limit: float,
    records: Sequence[ShardRecord],
    made: Sequence[ShardRecord],
    superseded: Ledger,
    folder: str,
) -> None:
    """Returns when at most `limit` of the rows in `records` failed, those `superseded` not counted.

    Raises StageFailed naming the first of them, or UserError where no row of the source `name` can be used. Shards among
    those just `made` with more failures than that for reasons that may pass then lose their receipts: an outage does not
    stand for ever, and the same command attempts them again.
    """
    ledger = sum((record.ledger for record in records), Ledger()) - superseded
    failed = sum(ledger.failed.values())
    if ledger.written and failed <= limit * ledger.attempted:
        return
    for record in made:
        passing = sum(n for why, n in record.ledger.failed.items() if why == MISSING or is_retryable(why))
        if passing > limit * record.ledger.attempted:
            storage.remove(manifest.receipt_path(folder, record.index))
    reasons = ", ".join(f"{count} {reason}" for reason, count in {**ledger.failed, **ledger.filtered}.items())
    if not ledger.written:
        raise UserError(f"none of the {ledger.attempted} rows of {name} can be used: {reasons}")
    shown = "; ".join(f"row {row}: {why}" for row, why in _failed_rows(folder, records, limit=5))
    raise StageFailed(
        f"{failed} of {ledger.attempted} rows failed ({reasons}), more than shard.max_failed_fraction="
        f"{limit}: {shown}. Mend them, or raise the limit with --set shard.max_failed_fraction=…"
    )


def table_of(folder: str, record: ShardRecord, columns: list[str]) -> pa.Table:
    """These columns of a shard's parquet. Raises CorruptArtifact where it cannot be read."""
    url = storage.join(folder, f"{record.index:05d}.parquet")
    try:
        with storage.open_read(url) as stream:
            return pq.read_table(stream, columns=columns)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise CorruptArtifact(
            f"{url} is missing or damaged: run `darkroom verify --repair` on its folder"
        ) from error


def _failed_rows(folder: str, records: Sequence[ShardRecord], *, limit: int) -> Iterator[tuple[str, str]]:
    """(source id, message) of the first rows that failed."""
    for record in records:
        if not record.ledger.failed or limit <= 0:
            continue
        rows = table_of(folder, record, ["source_id", "status", "error_message"]).to_pylist()
        failed = [row for row in rows if row["status"].startswith("failed")][:limit]
        limit -= len(failed)
        yield from ((row["source_id"], row["error_message"]) for row in failed)
