"""Where checkpoints lie: on a disk that every rank sees, or in an object store that every rank reaches.

On a disk one gets its final name when it is whole; in a store, where nothing can be renamed, its `state.json` is written
last. Both are read by name, and their files are checked by digest: a listing is a hint, and so is `LATEST`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data import storage
from data.manifest import FileRecord
from data.shard_cache import ShardCache
from training import checkpoint_facts, distributed
from training.checkpoint_facts import LATEST


class Place(Protocol):
    """Checkpoints of one training, by name: step_00000200."""

    def begin(self, name: str) -> None:
        """Makes room for a checkpoint to be written, and removes what a killed writer left; of rank 0 alone."""
        ...

    def draft(self, name: str) -> Path:
        """A folder that this rank writes its tensors into."""
        ...

    def keep(self, name: str, draft: Path, files: Sequence[Path]) -> None:
        """Brings the `files` that this rank wrote into its `draft` to where they can be committed."""
        ...

    def commit(self, name: str, facts: dict[str, Any], keep: int) -> None:
        """The checkpoint is there from now on; older ones go, but for the newest `keep` and the best one. Of rank 0 alone."""
        ...

    def names(self) -> list[str]:
        """Checkpoints that may be there, the newest first."""
        ...

    def read(self, name: str) -> dict[str, Any]:
        """What a checkpoint says of itself; raises ValueError or OSError when it is not whole."""
        ...

    def open(self, name: str, facts: dict[str, Any]) -> Path:
        """A folder with the tensors of a checkpoint; raises ValueError, OSError or CorruptArtifact where they are not those
        in its `facts`. Every rank calls it, and each may check a share of them."""
        ...


def place_of(folder: Path | str) -> Place:
    """The checkpoints under `folder`, a path or a URL."""
    return (
        _OnDisk(storage.local_path(str(folder))) if storage.is_local(str(folder)) else _InStore(str(folder))
    )


class _OnDisk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self, name: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".tmp-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.draft(name).mkdir()

    def draft(self, name: str) -> Path:
        return self.folder / f".tmp-{name}"

    def keep(self, name: str, draft: Path, files: Sequence[Path]) -> None:
        pass

    def commit(self, name: str, facts: dict[str, Any], keep: int) -> None:
        draft, target = self.draft(name), self.folder / name
        (draft / checkpoint_facts.FILE).write_bytes(checkpoint_facts.payload(facts))
        _sync(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.rename(target)
        pointer = self.folder / f".tmp-{LATEST}"
        pointer.write_text(name)
        pointer.replace(self.folder / LATEST)
        for old in _superseded(self, name, keep):
            shutil.rmtree(self.folder / old, ignore_errors=True)

    def names(self) -> list[str]:
        return [path.name for path in sorted(self.folder.glob("step_*"), reverse=True)]

    def read(self, name: str) -> dict[str, Any]:
        return checkpoint_facts.read(self.folder / name)

    def open(self, name: str, facts: dict[str, Any]) -> Path:
        files = sorted(facts["sha256"].items())[distributed.rank() :: distributed.world_size()]
        if damaged := [file for file, digest in files if sha256(self.folder / name / file) != digest]:
            raise ValueError(f"{', '.join(damaged)} changed on disk")
        return self.folder / name


class _InStore:
    def __init__(self, url: str) -> None:
        self.url = url

    def begin(self, name: str) -> None:
        storage.remove(storage.join(self.url, name, checkpoint_facts.FILE))

    def draft(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"darkroom-{name}-"))

    def keep(self, name: str, draft: Path, files: Sequence[Path]) -> None:
        for file in files:
            storage.publish_file(file, storage.join(self.url, name, file.name))
        shutil.rmtree(draft, ignore_errors=True)

    def commit(self, name: str, facts: dict[str, Any], keep: int) -> None:
        storage.write_bytes(
            storage.join(self.url, name, checkpoint_facts.FILE), checkpoint_facts.payload(facts)
        )
        storage.write_bytes(storage.join(self.url, LATEST), name.encode())
        for old in _superseded(self, name, keep):
            storage.remove(storage.join(self.url, old, checkpoint_facts.FILE))
            storage.remove_tree(storage.join(self.url, old))

    def names(self) -> list[str]:
        found = {name for name in storage.list_folders(self.url) if name.startswith("step_")}
        pointer = storage.join(self.url, LATEST)
        if storage.exists(pointer):
            found.add(storage.read_bytes(pointer).decode())
        return sorted(found, reverse=True)

    def read(self, name: str) -> dict[str, Any]:
        return checkpoint_facts.read(storage.join(self.url, name))

    def open(self, name: str, facts: dict[str, Any]) -> Path:
        files = [
            FileRecord(path=file, sha256=digest, bytes=facts["bytes"][file])
            for file, digest in sorted(facts["sha256"].items())
        ]
        return ShardCache.of_environment().fetched(storage.join(self.url, name), files)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _superseded(place: Place, newest: str, keep: int) -> list[str]:
    """All but the newest `keep` and the one with the lowest validation loss; what is newer was passed over as damaged."""
    steps = place.names()
    kept = {step for step in steps if step <= newest}
    scores = {step: loss for step in kept if (loss := _score(place, step)) is not None}
    best = min(scores, key=lambda step: (scores[step], step), default=newest)
    return sorted(set(steps) - {*sorted(kept)[-keep:], best})


def _score(place: Place, name: str) -> float | None:
    try:
        return place.read(name)["validation_loss"]
    except (OSError, ValueError, KeyError):
        return None


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
