"""Checks a store, an artifact or a run against its manifests: every digest, count, key order and join."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import Field

from data import joins, storage
from data.checksums import Checksum, checksum_of
from data.config import Config
from data.damage import describe
from data.errors import CorruptArtifact, UserError
from data.inventory import (
    RUN_RECORD,
    Artifact,
    Problem,
    artifact_folders,
    inventory,
    moved,
    run_folders,
)
from data.manifest import FileRecord, Ledger, Parent, ShardRecord, Snapshot, load_snapshot

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all)."""


class Checked(Config):
    """What was looked at of one stage: files are read whole, shards are those of the newest state of each artifact."""

    stage: str
    artifacts: int
    shards: int
    samples: int
    files: int
    bytes: int
    left_out: int = Field(
        0, description="samples that are there and passed over, such as those of a low CLIP score"
    )


class Verdict(Config):
    """What was found. The ledger is that of the shards of source rows, of each data set's newest state."""

    ok: bool
    attempted: int
    written: int
    filtered: int
    failed: int
    problems: tuple[Problem, ...]
    checked: tuple[Checked, ...] = Field((), exclude=True, description="by stage; not part of its JSON")


def verify(uri: str, progress: Progress = lambda *_: None) -> Verdict:
    """Checks every artifact at or below `uri`: a run, an artifact's folder, a stage's folder, a store, or a root.

    Every file is read once, by as many threads as there are CPUs. Raises UserError when nothing that a manifest
    describes lies there.
    """
    artifacts, problems = _artifacts(uri)
    total = sum(record.bytes for artifact in artifacts for record in _records(artifact))
    checking = _Checking(progress, total)
    for artifact in artifacts:
        problems += checking.problems(artifact)
    ledgers = (_ledger(a.newest) for a in artifacts if a.newest and a.newest.stage == "shard")
    ledger = sum(ledgers, Ledger())
    return Verdict(
        ok=not problems,
        attempted=ledger.attempted,
        written=ledger.written,
        filtered=sum(ledger.filtered.values()),
        failed=sum(ledger.failed.values()),
        problems=tuple(problems),
        checked=tuple(_checked(artifacts)),
    )


def is_external(parent: Parent) -> bool:
    """Whether `parent` is weights made elsewhere: it names what no snapshot describes."""
    named = {"stage": parent.stage, "version": 0, "fingerprint": parent.fingerprint, "config": {}}
    return Snapshot.model_validate(named).digest == parent.digest


def parent_folder(snapshot: Snapshot, parent: Parent) -> str:
    """Where `parent` lies: beside `snapshot` in its store, which may have been moved, or else where it was."""
    here = moved(parent.folder, snapshot.folder.rsplit("/", 2)[0], 2)
    return here if storage.exists(storage.join(here, "_meta")) else parent.folder


def _artifacts(uri: str) -> tuple[list[Artifact], list[Problem]]:
    if storage.exists(storage.join(uri, RUN_RECORD)):
        folders, problems = run_folders(uri)
    else:
        runs = [storage.join(uri, name) for name in storage.list_folders(uri)]
        checked = [run_folders(run)[1] for run in runs if storage.exists(storage.join(run, RUN_RECORD))]
        folders, problems = artifact_folders(uri), [problem for found in checked for problem in found]
    if not folders and not problems:
        raise UserError(
            f"{uri} holds nothing that Darkroom made: give a root, its store, a run, or one artifact's folder"
        )
    found = [inventory(folder) for folder in dict.fromkeys(folders)]
    return [artifact for artifact, _ in found], [*problems, *(p for _, told in found for p in told)]


def _checked(artifacts: Sequence[Artifact]) -> Iterator[Checked]:
    """What there was to check of each stage, in the order in which it was."""
    for stage in dict.fromkeys(a.newest.stage for a in artifacts if a.newest):
        made = [(a, a.newest) for a in artifacts if a.newest and a.newest.stage == stage]
        records = [record for artifact, _ in made for record in _records(artifact)]
        shards = [shard for _, newest in made for shard in newest.shards]
        passed_over = 0 if stage == "shard" else sum(sum(s.ledger.filtered.values()) for s in shards)
        yield Checked(
            stage=stage,
            artifacts=len(made),
            shards=len(shards),
            samples=sum(shard.samples for shard in shards),
            files=len(records),
            bytes=sum(record.bytes for record in records),
            left_out=passed_over,
        )


def _records(artifact: Artifact) -> list[FileRecord]:
    return [*artifact.files.values(), *(file for s in artifact.shards.values() for file in s.files)]


def _ledger(snapshot: Snapshot) -> Ledger:
    """As `Snapshot.ledger`, but without what a damaged manifest supersedes beyond its shards."""
    total = sum((shard.ledger for shard in snapshot.shards), Ledger())
    pairs = [(snapshot.superseded.filtered, total.filtered), (snapshot.superseded.failed, total.failed)]
    is_part = all(
        count <= there.get(reason, 0) for counts, there in pairs for reason, count in counts.items()
    )
    return snapshot.ledger if is_part and not snapshot.superseded.written else total


@dataclass
class _Checking:
    """The files of one artifact after the other, read in parallel."""

    progress: Progress
    total: int
    done: int = 0
    made: dict[tuple[str, str], Snapshot | None] = field(default_factory=dict)
    """Parents, each loaded once."""

    def problems(self, artifact: Artifact) -> Iterator[Problem]:
        shards = sorted(artifact.shards.values(), key=lambda shard: shard.index)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            files = pool.map(lambda file: _file(artifact, file), artifact.files.values())
            checked = pool.map(lambda shard: _shard(artifact, shard), shards)
            for file, problem in zip(artifact.files.values(), files, strict=True):
                self._advance(file.bytes)
                if problem:
                    yield problem
            spans = list[joins.Span]()
            for shard, (problems, span) in zip(shards, checked, strict=True):
                self._advance(sum(file.bytes for file in shard.files))
                yield from problems
                spans += [span] if span else []
        repeated = joins.repeated_keys(artifact.folder, spans)
        yield from (artifact.problem(path, what) for path, what in repeated)
        for snapshot in artifact.snapshots:
            yield from (artifact.problem(path, what) for path, what in joins.in_rows(snapshot))
            yield from self._parents(artifact, snapshot)

    def _advance(self, size: int) -> None:
        self.done += size
        self.progress(self.done, self.total)

    def _parents(self, artifact: Artifact, snapshot: Snapshot) -> Iterator[Problem]:
        for role, parent in snapshot.parents.items():
            folder = parent_folder(snapshot, parent)
            if is_external(parent) or not storage.exists(folder):
                continue  # weights made elsewhere, or a parent that was cleaned away: nothing to hold against
            told = _held_against(role, parent, folder, made := self._load(folder, parent.fingerprint))
            if told:
                yield Problem(uri=snapshot.folder, problem=told, folder=snapshot.folder)
            if made is not None and snapshot is artifact.newest:
                for shard in snapshot.shards:
                    yield from _join(artifact, snapshot, shard, role, made)
                if role == "data" and joins.ROW_ALIGNED & set(snapshot.columns):
                    yield from _left_out(snapshot, made)

    def _load(self, folder: str, fingerprint: str) -> Snapshot | None:
        if (folder, fingerprint) not in self.made:
            try:
                self.made[folder, fingerprint] = load_snapshot(folder, fingerprint)
            except CorruptArtifact:
                self.made[folder, fingerprint] = None
        return self.made[folder, fingerprint]


def _held_against(role: str, parent: Parent, folder: str, made: Snapshot | None) -> str:
    if made is None:
        return f"its {role} cannot be held against it: {folder} has no intact snapshot {parent.fingerprint}"
    return f"was made from another {role} than {folder} now holds" if made.digest != parent.digest else ""


def _file(artifact: Artifact, file: FileRecord, shard: int | None = None) -> Problem | None:
    uri = storage.join(artifact.folder, file.path)
    try:
        found = checksum_of(uri)
        told = "" if _agrees(file, found) else describe(uri, file, found)
    except FileNotFoundError:
        told = "is missing"
    except OSError as error:
        told = f"cannot be read: {error}"
    return artifact.problem(file.path, told, shard) if told else None


def _agrees(file: FileRecord, found: Checksum) -> bool:
    blocks = file.blocks in ("", found.blocks)
    return (found.bytes, found.sha256) == (file.bytes, file.sha256) and blocks


def _shard(artifact: Artifact, shard: ShardRecord) -> tuple[list[Problem], joins.Span | None]:
    """What is wrong with one shard, and the span of its keys where it has a sound tar."""
    problems = {file.path: _file(artifact, file, shard.index) for file in shard.files}
    sound = {path for path, problem in problems.items() if problem is None}
    if "image" in artifact.columns:
        found, span = joins.in_pairs(artifact.folder, shard, sound)
    else:
        columns = sorted(joins.ROW_ALIGNED & set(artifact.columns))
        found, span = list(joins.in_columns(artifact.folder, shard, columns, sound)), None
    told = [problem for problem in problems.values() if problem]
    return [*told, *(artifact.problem(path, what, shard.index) for path, what in found)], span


def _join(
    artifact: Artifact, snapshot: Snapshot, shard: ShardRecord, role: str, made: Snapshot
) -> Iterator[Problem]:
    theirs = {s.index: s for s in made.shards}.get(shard.index)
    digests = {made.digest, theirs.digest if theirs else ""}
    path = shard.files[0].path if shard.files else ""
    if role in shard.parents and shard.parents[role] not in digests:
        told = f"is stale: it was made from another {role} than shard {shard.index:05d} of {made.folder}"
        yield artifact.problem(path, told, shard.index)
    elif role == "data" and theirs and joins.ROW_ALIGNED & set(snapshot.columns):
        yield from _misaligned(artifact, shard, theirs, path)


def _left_out(snapshot: Snapshot, data: Snapshot) -> Iterator[Problem]:
    there = {shard.index for shard in snapshot.shards}
    for shard in data.shards:
        if shard.samples and shard.index not in there:
            told = f"has no shard {shard.index:05d}, which {data.folder} has with {shard.samples} samples"
            yield Problem(uri=snapshot.folder, problem=told, folder=snapshot.folder)


def _misaligned(artifact: Artifact, shard: ShardRecord, theirs: ShardRecord, path: str) -> Iterator[Problem]:
    if (shard.samples, shard.keys) != (theirs.samples, theirs.keys):
        rows = f"{shard.samples} rows against {theirs.samples}, or another order"
        yield artifact.problem(path, f"is not row-aligned with shard {shard.index:05d}: {rows}", shard.index)
