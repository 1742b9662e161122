"""Whether a shard's files agree with its record and with each other: keys, order, counts, outcomes, row boundaries.

Only files whose digest is right are looked at; what is wrong with the others is known without opening them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data import columns, growth, storage
from data.columns import array_path
from data.errors import CorruptArtifact
from data.manifest import Ledger, ShardRecord, Snapshot, keys_digest
from data.schema import COLUMNS
from data.tars import ShardReader

Finding = tuple[str, str]
"""(path of the file in the artifact's folder, what is wrong)."""
Span = tuple[str, str, str]
"""(least key, greatest key, path of the tar that has them)."""
ROW_ALIGNED = frozenset({"img_emb", "text_emb", "text_hidden", "kept", "t5_hidden", "vae_moments"})
"""Columns with one row per sample of the shard that they were made from."""


def in_pairs(folder: str, shard: ShardRecord, sound: Container[str]) -> tuple[list[Finding], Span | None]:
    """What is wrong with a shard of images and captions, and the span of its keys where its tar tells."""
    found, keys = list[Finding](), None
    tar = f"{shard.index:05d}.tar"
    if shard.samples and tar not in {file.path for file in shard.files}:
        found.append((tar, f"is no file of its shard, which has {shard.samples} samples"))
    if tar in sound:
        try:
            with ShardReader(storage.join(folder, tar)) as reader:
                keys = reader.keys
        except (CorruptArtifact, OSError) as error:
            found.append((tar, str(error)))
    if keys is not None and (len(keys) != shard.samples or keys_digest(keys) != shard.keys):
        told = f"holds {len(keys)} samples whose keys or order are not the {shard.samples} of its manifest"
        found.append((tar, told))
    found += [*_table(folder, shard, sound, keys), *_stats(folder, shard, sound)]
    return found, (min(keys), max(keys), tar) if keys else None


def in_columns(
    folder: str, shard: ShardRecord, names: Sequence[str], sound: Container[str]
) -> Iterator[Finding]:
    """What is wrong with a shard of row-aligned columns `names`, and of clip-retrieval's metadata beside them."""
    listed = {file.path for file in shard.files}
    for name in names:
        path = array_path(name, shard.index)
        if path not in listed:
            yield path, f"is no file of its shard, which should have the column {name}"
        if path not in sound:
            continue
        is_ragged = COLUMNS[name].kind == "ragged"
        try:
            opened = (columns.open_ragged if is_ragged else columns.open_array)(folder, name, shard.index)
        except FileNotFoundError:
            continue
        except (CorruptArtifact, OSError) as error:
            yield path, str(error)
            continue
        if len(opened) != shard.samples:
            yield path, f"has {len(opened)} rows for {shard.samples} samples"
    path = f"metadata/metadata_{shard.index:05d}.parquet"
    if path in sound:
        yield from _metadata(folder, path, shard)


def repeated_keys(folder: str, spans: Sequence[Span]) -> Iterator[Finding]:
    """Samples of one key in two shards; a key names one sample of a data set. Only tars whose keys interleave are read."""
    reaching: Span | None = None
    for span in sorted(spans):
        low, high, path = span
        if reaching and low <= reaching[1]:
            shared = sorted(set(_keys(folder, path)) & set(_keys(folder, reaching[2])))
            if shared:
                yield path, f"has {len(shared)} keys that {reaching[2]} has too, first {shared[0]}"
        if reaching is None or high > reaching[1]:
            reaching = span


def _keys(folder: str, path: str) -> tuple[str, ...]:
    with ShardReader(storage.join(folder, path)) as reader:
        return reader.keys


def in_rows(snapshot: Snapshot) -> Iterator[Finding]:
    """What is wrong with the list of rows of a state of a growing data set, held against its shards' ledgers."""
    path = growth.rows_path(snapshot.fingerprint)
    if path not in {file.path for file in snapshot.files}:
        return
    try:
        known = growth.load(snapshot)
    except (CorruptArtifact, KeyError):
        return  # its digest tells
    attempted = sum(shard.ledger.attempted for shard in snapshot.shards)
    written = sum(shard.ledger.written for shard in snapshot.shards)
    states = Counter(known.rows["state"].tolist())
    if len(known.rows) != attempted or states[growth.WRITTEN] != written:
        told = f"lists {len(known.rows)} rows, {states[growth.WRITTEN]} of them written; its shards attempted {attempted}"
        yield path, f"{told} and wrote {written}"
    elif max(known.rows["reason"], default=0) >= max(1, len(known.reasons)) or (
        known.superseded != snapshot.superseded
    ):
        yield path, "supersedes other rows than its snapshot says"


def _table(
    folder: str, shard: ShardRecord, sound: Container[str], keys: tuple[str, ...] | None
) -> Iterator[Finding]:
    path = f"{shard.index:05d}.parquet"
    if path not in sound:
        return
    try:
        rows = _read(folder, path, ["key", "status", "error_class"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        yield path, f"cannot be read: {error}"
        return
    written = [key for key, status in zip(rows["key"], rows["status"], strict=True) if status == "success"]
    if len(rows["key"]) != shard.ledger.attempted:
        yield path, f"has {len(rows['key'])} rows, the ledger attempted {shard.ledger.attempted}"
    elif _ledger(rows) != shard.ledger:
        yield path, f"has other outcomes than its ledger: {_ledger(rows)} against {shard.ledger}"
    elif keys_digest(written) != shard.keys:
        yield path, "lists other keys as written, or in another order, than its manifest"
    elif keys is not None and tuple(written) != keys:
        at = next(n for n, pair in enumerate(zip(written, keys, strict=False)) if pair[0] != pair[1])
        yield path, f"is not aligned with its tar: sample {at} is {written[at]} here and {keys[at]} there"


def _ledger(rows: dict[str, list[Any]]) -> Ledger:
    outcomes = Counter(zip(rows["status"], rows["error_class"], strict=True))
    counts: dict[str, dict[str, int]] = {"filtered": {}, "failed": {}}
    for (status, reason), count in sorted(outcomes.items(), key=str):
        if status != "success":
            kind = counts["failed" if str(status).startswith("failed") else "filtered"]
            kind[str(reason)] = kind.get(str(reason), 0) + count
    return Ledger(written=sum(n for (status, _), n in outcomes.items() if status == "success"), **counts)


def _stats(folder: str, shard: ShardRecord, sound: Container[str]) -> Iterator[Finding]:
    path = f"{shard.index:05d}_stats.json"
    if path not in sound:
        return
    try:
        stats = json.loads(storage.read_bytes(storage.join(folder, path)))
        count, successes = stats["count"], stats["successes"]
    except (ValueError, KeyError, TypeError) as error:
        yield path, f"cannot be read: {error}"
        return
    if (count, successes) != (shard.ledger.attempted, shard.ledger.written):
        yield (
            path,
            f"counts {successes} of {count}, the ledger {shard.ledger.written} of {shard.ledger.attempted}",
        )


def _metadata(folder: str, path: str, shard: ShardRecord) -> Iterator[Finding]:
    try:
        keys = _read(folder, path, ["image_path"])["image_path"]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        yield path, f"cannot be read: {error}"
        return
    if keys_digest(map(str, keys)) != shard.keys:
        yield path, f"has {len(keys)} rows whose keys or order are not the {shard.samples} of its manifest"


def _read(folder: str, path: str, names: list[str]) -> dict[str, list[Any]]:
    with storage.open_read(storage.join(folder, path)) as stream:
        table = pq.read_table(stream, columns=names)
    return {name: table[name].to_pylist() for name in names}
