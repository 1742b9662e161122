"""Checks a store, an artifact or a run against its manifests: every digest, count, key order and join."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import pyarrow.parquet as pq

from data import storage
from data.config import Config
from data.errors import CorruptArtifact, UserError
from data.manifest import FileRecord, Ledger, ShardRecord, Snapshot, keys_digest, load_snapshot, snapshots
from data.tars import ShardReader


class Problem(Config):
    """One thing that is not as its manifest says."""

    uri: str
    problem: str


class Verdict(Config):
    """What was found. The ledger is that of the shards of source rows."""

    ok: bool
    attempted: int
    written: int
    filtered: int
    failed: int
    problems: tuple[Problem, ...]


def verify(uri: str) -> Verdict:
    """Checks every artifact at or below `uri`: an artifact's folder, a stage's folder, a store, or a root.

    Raises UserError when nothing that a manifest describes lies there.
    """
    found, problems = [], []
    for folder in artifact_folders(uri):
        try:
            found += snapshots(folder)
        except CorruptArtifact as error:
            problems.append(Problem(uri=folder, problem=str(error)))
    if not found and not problems:
        raise UserError(
            f"{uri} holds nothing that Darkroom made: give a root, its store, or one artifact's folder"
        )
    for snapshot in found:
        problems += [Problem(uri=u, problem=p) for u, p in _problems(snapshot)]
    ledger = sum((s.ledger for s in found if s.stage == "shard"), Ledger())
    return Verdict(
        ok=not problems,
        attempted=ledger.attempted,
        written=ledger.written,
        filtered=sum(ledger.filtered.values()),
        failed=sum(ledger.failed.values()),
        problems=tuple(problems),
    )


def artifact_folders(uri: str) -> list[str]:
    """The folders with a manifest at `uri` or up to three levels below it."""
    if storage.list_files(storage.join(uri, "_meta", "snapshots")):
        return [uri]
    level, found = [uri], []
    for _ in range(3):
        level = [
            storage.join(f, name)
            for f in level
            for name in storage.list_folders(f)
            if not name.startswith(".")
        ]
        found += [f for f in level if storage.list_files(storage.join(f, "_meta", "snapshots"))]
    return found


def _problems(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for file in [*snapshot.files, *(file for shard in snapshot.shards for file in shard.files)]:
        yield from _file(snapshot.folder, file)
    if snapshot.stage == "shard":
        for shard in snapshot.shards:
            yield from _shard(snapshot.folder, shard)
    yield from _parents(snapshot)


def _file(folder: str, file: FileRecord) -> Iterator[tuple[str, str]]:
    uri = storage.join(folder, file.path)
    try:
        size, digest = storage.sha256(uri)
    except FileNotFoundError:
        yield uri, "is missing"
        return
    except OSError as error:
        yield uri, f"cannot be read: {error}"
        return
    if size != file.bytes:
        yield uri, f"has {size} bytes, its manifest says {file.bytes}"
    elif digest != file.sha256:
        yield (
            uri,
            f"its {size} bytes changed: SHA-256 is {digest[:12]}…, its manifest says {file.sha256[:12]}…",
        )


def _shard(folder: str, shard: ShardRecord) -> Iterator[tuple[str, str]]:
    tars = [file.path for file in shard.files if PurePosixPath(file.path).suffix == ".tar"]
    for path in tars:
        uri = storage.join(folder, path)
        try:
            with ShardReader(uri) as reader:
                keys = reader.keys
        except FileNotFoundError:
            continue  # already told
        except (CorruptArtifact, OSError) as error:
            yield uri, str(error)
            continue
        if len(keys) != shard.samples or keys_digest(keys) != shard.keys:
            yield (
                uri,
                f"holds {len(keys)} samples whose keys or order are not the {shard.samples} of its manifest",
            )
    table = storage.join(folder, f"{shard.index:05d}.parquet")
    try:
        with storage.open_read(table) as stream:
            rows = pq.ParquetFile(stream).metadata.num_rows
    except (OSError, ValueError) as error:
        yield table, f"cannot be read: {error}"
        return
    if rows != shard.ledger.attempted:
        yield table, f"has {rows} rows, the ledger attempted {shard.ledger.attempted}"


def _parents(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for role, parent in snapshot.parents.items():
        try:
            made = load_snapshot(parent.folder, parent.fingerprint) if storage.exists(parent.folder) else None
        except CorruptArtifact as error:
            yield snapshot.folder, f"its {role} cannot be held against it: {error}"
            continue
        if made is None:
            continue  # weights made elsewhere, or a parent that was cleaned away: nothing to hold against
        if made.digest != parent.digest:
            yield snapshot.folder, f"was made from another {role} than {parent.folder} now holds"
        theirs = {shard.index: shard for shard in made.shards}
        for shard in snapshot.shards:
            if role == "data" and "data" in shard.parents and set(snapshot.columns) and shard.index in theirs:
                yield from _join(snapshot, shard, theirs[shard.index])


def _join(snapshot: Snapshot, shard: ShardRecord, parent: ShardRecord) -> Iterator[tuple[str, str]]:
    aligned = {"img_emb", "vae_moments"} & set(snapshot.columns)
    if aligned and (shard.samples, shard.keys) != (parent.samples, parent.keys):
        yield (
            storage.join(snapshot.folder, shard.files[0].path),
            f"is not row-aligned with shard {shard.index:05d}: {shard.samples} rows against {parent.samples}, or another order",
        )
