"""What an artifact's folder holds by its manifests: the states it went through, its receipts, and what none of them names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pydantic import Field

from data import storage
from data.config import Config, fingerprint
from data.errors import CorruptArtifact
from data.manifest import FileRecord, ShardRecord, Snapshot, load_snapshot

RUN_RECORD = "run.json"
_CLAIMED = frozenset({".tar", ".npy", ".parquet"})
"""Files of these kinds are read by their place alone: one that no manifest names would be taken for data."""


class Problem(Config):
    """One thing that is not as its manifest says. What repair needs to know of it is not part of its JSON."""

    uri: str
    problem: str
    folder: str = Field(
        default="", exclude=True, description="the artifact's; empty: no artifact is concerned"
    )
    path: str = Field(
        default="", exclude=True, description="of the file in it; empty: no one file is concerned"
    )
    shard: int | None = Field(default=None, exclude=True, description="whose files or receipt are concerned")


@dataclass(frozen=True)
class Artifact:
    """The manifests of one folder."""

    folder: str
    snapshots: tuple[Snapshot, ...]
    """Its states from the oldest to the newest; a growing artifact has several."""
    receipts: dict[int, ShardRecord] = field(default_factory=dict)
    """Of finished shards, those that no snapshot has yet among them."""

    @property
    def newest(self) -> Snapshot | None:
        """The state that has all shards; None where nothing was committed."""
        return self.snapshots[-1] if self.snapshots else None

    @property
    def shards(self) -> dict[int, ShardRecord]:
        """index -> the shard as the newest state has it, or as its receipt says where no state has it."""
        listed = {shard.index: shard for snapshot in self.snapshots for shard in snapshot.shards}
        return self.receipts | listed

    @property
    def files(self) -> dict[str, FileRecord]:
        """path -> record of each file that is in no shard; the newest state counts where a file was written anew."""
        in_shards = {file.path for shard in self.shards.values() for file in shard.files}
        listed = {file.path: file for snapshot in self.snapshots for file in snapshot.files}
        return {path: file for path, file in listed.items() if path not in in_shards}

    @property
    def columns(self) -> tuple[str, ...]:
        """What its shards hold."""
        return self.newest.columns if self.newest else ()

    @property
    def is_being_built(self) -> bool:
        """Whether a run holds its lease, or was killed while it did: what it left is no damage."""
        return storage.exists(storage.join(self.folder, "_meta", "lease.json"))

    def problem(self, path: str, what: str, shard: int | None = None) -> Problem:
        """A problem with the file at `path` of this artifact."""
        return Problem(
            uri=storage.join(self.folder, path), problem=what, folder=self.folder, path=path, shard=shard
        )


def artifact_folders(uri: str) -> list[str]:
    """The folders with manifests at `uri` or up to three levels below it."""
    if _has_manifests(uri):
        return [uri]
    level, found = [uri], []
    for _ in range(3):
        level = [
            storage.join(f, name)
            for f in level
            for name in storage.list_folders(f)
            if not name.startswith((".", "_"))
        ]
        found += [f for f in level if _has_manifests(f)]
        level = [f for f in level if f not in found]
    return found


def run_folders(uri: str) -> tuple[list[str], list[Problem]]:
    """The folders of the artifacts that the run in the folder `uri` made, and what is wrong with its record.

    A root that was moved as a whole is followed: the run's artifacts are looked for beside it first.
    """
    record = storage.join(uri, RUN_RECORD)
    try:
        stages = json.loads(storage.read_bytes(record))["stages"]
        recorded = [stage["uri"] for stage in stages]
    except (ValueError, KeyError, TypeError) as error:
        return [], [Problem(uri=record, problem=f"is no record of a run: {error}")]
    folders, problems = [], []
    for folder in recorded:
        here = moved(folder, uri.rsplit("/", 1)[0], 3)
        found = next((f for f in (here, folder) if _has_manifests(f)), None)
        if found:
            folders.append(found)
        else:
            problems.append(
                Problem(uri=folder, problem=f"is missing, but {record} names it: run its recipe again")
            )
    return folders, problems


def moved(folder: str, base: str, levels: int) -> str:
    """Where `folder` would lie if `base`, which is `levels` above it, had been moved to where it is now."""
    return "/".join([base, *folder.rstrip("/").rsplit("/", levels)[1:]])


def inventory(folder: str) -> tuple[Artifact, list[Problem]]:
    """The artifact in `folder` by those of its manifests that can be read, and what is wrong with them."""
    problems: list[Problem] = []
    made = list(_snapshots(folder, problems))
    receipts = dict(_receipts(folder, problems))
    artifact = Artifact(folder, tuple(sorted(made, key=lambda s: (len(s.shards), s.created))), receipts)
    return artifact, [*problems, *_contradictions(artifact), *_unclaimed(artifact)]


def _has_manifests(folder: str) -> bool:
    return any(
        name.endswith(".json")
        for kind in ("snapshots", "receipts")
        for name in storage.list_files(storage.join(folder, "_meta", kind))
    )


def _snapshots(folder: str, problems: list[Problem]) -> Iterator[Snapshot]:
    for name in storage.list_files(storage.join(folder, "_meta", "snapshots")):
        path = f"_meta/snapshots/{name}"
        try:
            snapshot = load_snapshot(folder, name.removesuffix(".json"))
        except (CorruptArtifact, OSError) as error:
            problems.append(_problem(folder, path, f"cannot be read: {_line(error)}"))
            continue
        if snapshot is None or not snapshot.fingerprint == _made_by(snapshot) == name.removesuffix(".json"):
            told = "is not what its name stands for: its stage, version, config or parents changed"
            problems.append(_problem(folder, path, told))
        else:
            yield snapshot


def _made_by(snapshot: Snapshot) -> str:
    """The fingerprint that a plan gives to what the snapshot says made it."""
    inputs = {role: parent.fingerprint for role, parent in snapshot.parents.items()}
    return fingerprint(snapshot.stage, snapshot.version, snapshot.config, inputs)


def _receipts(folder: str, problems: list[Problem]) -> Iterator[tuple[int, ShardRecord]]:
    for name in storage.list_files(storage.join(folder, "_meta", "receipts")):
        path, stem = f"_meta/receipts/{name}", name.removesuffix(".json")
        index = int(stem) if stem.isdecimal() else None
        try:
            record = ShardRecord.model_validate_json(storage.read_bytes(storage.join(folder, path)))
        except (ValueError, OSError) as error:
            problems.append(_problem(folder, path, f"cannot be read: {_line(error)}", index))
            continue
        if record.index != index:
            problems.append(_problem(folder, path, f"is the receipt of shard {record.index:05d}", index))
        else:
            yield record.index, record


def _contradictions(artifact: Artifact) -> Iterator[Problem]:
    """Shards are immutable: every state that has one, and its receipt, say the same of it."""
    first: dict[int, tuple[Snapshot, ShardRecord]] = {}
    for snapshot in artifact.snapshots:
        for shard in snapshot.shards:
            earlier, known = first.setdefault(shard.index, (snapshot, shard))
            if known.digest != shard.digest:
                path = f"_meta/snapshots/{snapshot.fingerprint}.json"
                told = f"has another shard {shard.index:05d} than the earlier state {earlier.fingerprint}"
                yield artifact.problem(path, told, shard.index)
    for index, receipt in artifact.receipts.items():
        if index in first and receipt.digest != first[index][1].digest:
            told = f"is not of the shard {index:05d} that the snapshot {first[index][0].fingerprint} lists"
            yield artifact.problem(f"_meta/receipts/{index:05d}.json", told, index)


def _unclaimed(artifact: Artifact) -> Iterator[Problem]:
    if artifact.newest is None or artifact.is_being_built:
        return
    named = {file.path for shard in artifact.shards.values() for file in shard.files} | set(artifact.files)
    # a receipt that contradicts its snapshot names files too: they are told of there
    named |= {file.path for receipt in artifact.receipts.values() for file in receipt.files}
    inner = [f for f in storage.list_folders(artifact.folder) if not f.startswith((".", "_"))]
    for prefix in ("", *(f"{name}/" for name in inner)):
        for name in storage.list_files(storage.join(artifact.folder, *prefix.split("/")[:-1])):
            if PurePosixPath(name).suffix in _CLAIMED and prefix + name not in named:
                told = "belongs to no snapshot and no receipt: remove it, or run its recipe again if a run was interrupted"
                yield artifact.problem(prefix + name, told)


def _problem(folder: str, path: str, what: str, shard: int | None = None) -> Problem:
    return Problem(uri=storage.join(folder, path), problem=what, folder=folder, path=path, shard=shard)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
