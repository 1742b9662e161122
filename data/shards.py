"""Shards in img2dataset's layout: written once, reproducible to the byte, read without unpacking.

{i:05d}.tar         the samples that succeeded; of each: {key}.jpg|png|webp, {key}.json, {key}.txt
{i:05d}.parquet     every attempted row
{i:05d}_stats.json  counts, written last
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from data import captions, images, storage
from data.captions import CaptionRules
from data.columns import parquet_bytes, publish
from data.config import operational
from data.duplicates import Repeat
from data.errors import SampleError
from data.images import ImageRules, Prepared
from data.likeness import MAX_DISTANCE, payload_hash
from data.manifest import FileRecord, Ledger, ShardRecord, keys_digest
from data.originals import Originals
from data.rows import Row
from data.tars import ShardReader, TarWriter
from data.urls import redacted
from data.web import FetchRules

_JSON = json.JSONEncoder(ensure_ascii=False)
_COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("error_class", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("exif", pa.string()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("source_id", pa.string()),
    ]
)
"""`url` is the image's place as the source names it, `sha256` that of the original bytes, `phash` the stored picture's
perceptual hash where near-duplicates are looked for, `error_class` the ledger's
reason; `status` is `success`, `failed_to_download` (no bytes were had), `failed_to_resize` or `filtered`."""

_NOTHING_KNOWN: dict[str, Any] = dict.fromkeys(_COLUMNS.names)


class ShardConfig(ImageRules, CaptionRules):
    """How rows become shards."""

    samples_per_shard: int = Field(
        default=10_000, ge=1, description="rows of the source per shard, whatever fails among them"
    )
    max_failed_fraction: float = operational(
        0.05,
        ge=0,
        le=1,
        description="the stage fails when a larger part of the dataset's rows failed (filtered ones do not count)",
    )
    deduplicate: Literal["no", "exact", "near"] = Field(
        default="no",
        description="filter pictures that repeat an earlier one: exact, the same original bytes; near, also a like look",
    )
    near_distance: int = Field(
        default=4,
        ge=0,
        le=MAX_DISTANCE,
        description="bits of 64 by which the perceptual hashes of near-duplicates differ",
    )
    fetch: FetchRules = FetchRules()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row: its line of the parquet, and the picture when it is to be written."""

    fields: dict[str, Any]
    image: Prepared | None = None


def sample_key(index: int, row: int, samples_per_shard: int) -> str:
    """The key of row `row` of shard `index`: five digits of the shard, then the row in at least four.

    With 1,001 to 10,000 samples per shard that is img2dataset's nine-digit key. Keys sort in the order of the source
    and are unique in a dataset.
    """
    width = max(4, len(str(samples_per_shard - 1)))
    return f"{index:05d}{row:0{width}d}"


def attempt(row: Row, key: str, config: ShardConfig, read: Callable[[Row], bytes]) -> Outcome:
    """Checks, reads and prepares one row; whatever is wrong with the row is in the outcome, not raised.

    `read` gives the original of a row whose caption was found good, or raises SampleError.
    """
    fields = _NOTHING_KNOWN | {
        "key": key,
        "url": row.source_id,
        "caption": row.caption,
        "source_id": row.source_id,
    }
    try:
        fields["caption"] = _caption(row, config)
        payload = read(row)
        fields["sha256"] = hashlib.sha256(payload).hexdigest()
        image = images.prepare(payload, config)
    except SampleError as error:
        failed = "failed_to_resize" if fields["sha256"] else "failed_to_download"
        status = "filtered" if error.filtered else failed
        return Outcome(
            fields | {"status": status, "error_class": error.reason, "error_message": redacted(str(error))}
        )
    fields |= {"status": "success", "width": image.width, "height": image.height, "exif": image.exif}
    fields |= {"original_width": image.original_width, "original_height": image.original_height}
    if config.deduplicate == "near":
        fields["phash"] = payload_hash(image.payload)
    return Outcome(fields, image)


def write_shard(
    rows: Sequence[Row],
    index: int,
    folder: str,
    config: ShardConfig,
    recorded: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> ShardRecord:
    """Writes shard `index` from its rows of the source under `folder`, an fsspec URL, and returns its record.

    Equal rows and files give equal bytes. Where no row succeeds there is no tar. Rows whose keys are in `recorded` are not
    attempted: they were not written, and these are their lines of the parquet. OSError of the destination, such as a full
    disk, is raised; nothing half-written then lies under a final name.
    """
    assert len(rows) <= config.samples_per_shard, f"shard {index} was given {len(rows)} rows"
    lines: list[dict[str, Any]] = []
    with _scratch_file(folder, f"{index:05d}.tar") as scratch:
        with scratch.open("wb") as stream, closing(_outcomes(rows, index, config, recorded)) as outcomes:
            tar = TarWriter(stream)
            for outcome in outcomes:
                lines.append(outcome.fields)
                if outcome.image is not None:
                    _add_sample(tar, outcome.fields, outcome.image)
            tar.finish()
        any_written = any(line["status"] == "success" for line in lines)
        name = f"{index:05d}.tar"
        files = _publish_tar(scratch, tar, folder, name) if any_written else _remove_tar(folder, name)
    return _record(folder, index, lines, files)


def settle_shard(draft: str, folder: str, index: int, repeats: Sequence[Repeat]) -> ShardRecord:
    """Publishes under `folder` what shard `index` under `draft` is without `repeats`, which become filtered rows.

    The draft stays as it is, so that another decision can be carried out later. Returns the record, without parents.
    """
    found = {repeat.key: repeat for repeat in repeats}
    with storage.open_read(storage.join(draft, f"{index:05d}.parquet")) as stream:
        lines = pq.read_table(stream).to_pylist()
    for line in lines:
        if repeat := found.get(line["key"]):
            line |= {
                "status": "filtered",
                "error_class": repeat.reason,
                "error_message": f"repeats {repeat.first}",
            }
    kept = {line["key"] for line in lines if line["status"] == "success"}
    return _record(folder, index, lines, _copy_tar(draft, folder, f"{index:05d}.tar", kept))


def _copy_tar(draft: str, folder: str, name: str, kept: Collection[str]) -> list[FileRecord]:
    """Publishes the draft's tar with the samples of `kept` alone, byte for byte; none where there is no such sample."""
    if not kept:
        return _remove_tar(folder, name)
    with _scratch_file(folder, name) as scratch, ShardReader(storage.join(draft, name)) as reader:
        bounds = [*reader.starts, reader.end]
        with scratch.open("wb") as stream:
            tar = TarWriter(stream)
            for row, key in enumerate(reader.keys):
                if key in kept:
                    tar.add_sample(reader.raw(bounds[row], bounds[row + 1]))
            tar.finish()
        return _publish_tar(scratch, tar, folder, name)


def _record(folder: str, index: int, lines: list[dict[str, Any]], files: list[FileRecord]) -> ShardRecord:
    """Publishes the shard's tables, the tar being there, and returns its record."""
    keys = [line["key"] for line in lines if line["status"] == "success"]
    table = parquet_bytes(pa.Table.from_pylist(lines, schema=_COLUMNS))
    files = [
        *files,
        publish(folder, f"{index:05d}.parquet", table),
        publish(folder, f"{index:05d}_stats.json", _stats(lines)),
    ]
    return ShardRecord(
        index=index,
        samples=len(keys),
        keys=keys_digest(keys),
        files=tuple(files),
        ledger=_ledger(lines),
        parents={},
    )


def _outcomes(
    rows: Sequence[Row], index: int, config: ShardConfig, recorded: Mapping[str, dict[str, Any]]
) -> Generator[Outcome, None, None]:
    """What became of each row, in order; no original is fetched in vain."""
    keys = [sample_key(index, number, config.samples_per_shard) for number in range(len(rows))]
    with ExitStack() as stack:
        originals = stack.enter_context(Originals(config.max_bytes, config.fetch))
        rows = originals.with_captions(rows)
        attempted = (row for key, row in zip(keys, rows, strict=True) if key not in recorded)
        wanted = (row for row in attempted if _has_caption(row, config))
        payloads = stack.enter_context(closing(originals.read_all(wanted)))

        def read(_: Row) -> bytes:
            if isinstance(payload := next(payloads), SampleError):
                raise payload
            return payload

        for key, row in zip(keys, rows, strict=True):
            known = recorded.get(key)
            yield attempt(row, key, config, read) if known is None else Outcome(known)


def _caption(row: Row, config: ShardConfig) -> str:
    """The row's cleaned caption; raises SampleError for a row that is bad before its image is read."""
    if row.defect is not None:
        raise SampleError(*row.defect)
    return captions.clean(row.caption, config)


def _has_caption(row: Row, config: ShardConfig) -> bool:
    try:
        return bool(_caption(row, config))
    except SampleError:
        return False


def _add_sample(tar: TarWriter, fields: dict[str, Any], image: Prepared) -> None:
    key = fields["key"]
    tar.add(f"{key}.{image.extension}", image.payload)
    tar.add(f"{key}.json", _JSON.encode(fields).encode())
    tar.add(f"{key}.txt", fields["caption"].encode())


@contextmanager
def _scratch_file(folder: str, name: str) -> Iterator[Path]:
    """A path to build a file at, on the same file system as a local `folder`; what is left there is deleted."""
    home = storage.local_path(folder) if storage.is_local(folder) else Path(tempfile.gettempdir())
    home.mkdir(parents=True, exist_ok=True)
    path = home / f".tmp-{secrets.token_hex(6)}-{name}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish_tar(scratch: Path, tar: TarWriter, folder: str, name: str) -> list[FileRecord]:
    storage.publish_file(scratch, storage.join(folder, name))
    return [FileRecord(path=name, bytes=tar.bytes, sha256=tar.sha256, blocks=tar.blocks)]


def _remove_tar(folder: str, name: str) -> list[FileRecord]:
    """A killed attempt may have published a tar of rows that have failed since."""
    storage.remove(storage.join(folder, name))
    return []


def _stats(lines: Sequence[dict[str, Any]]) -> bytes:
    """img2dataset's keys. Its times would make equal shards differ, and it divides by `duration`: hence a constant 1 s.

    It knows no `filtered`: as with its own filters, those rows are among `failed_to_resize`.
    """
    status = Counter(line["status"] for line in lines)
    stats = {
        "count": len(lines),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"] + status["filtered"],
        "duration": 1.0,
        "start_time": 0.0,
        "end_time": 1.0,
        "status_dict": dict(sorted(Counter(line["error_class"] or "success" for line in lines).items())),
    }
    return (json.dumps(stats, indent=4) + "\n").encode()


def _ledger(lines: Sequence[dict[str, Any]]) -> Ledger:
    filtered = Counter(line["error_class"] for line in lines if line["status"] == "filtered")
    failed = Counter(line["error_class"] for line in lines if line["status"].startswith("failed"))
    written = len(lines) - filtered.total() - failed.total()
    return Ledger(
        written=written, filtered=dict(sorted(filtered.items())), failed=dict(sorted(failed.items()))
    )
