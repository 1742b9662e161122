"""The artifacts under a root: where each lies, how far it is, who builds it, and what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from data import storage
from data.lease import Owner, holder
from data.manifest import Snapshot, snapshots

STORE = "store"
Name = tuple[str, str]
"""(stage, key): what an artifact is called under any root, also after a root was moved."""


@dataclass(frozen=True)
class Stored:
    """One folder of the store."""

    name: Name
    folder: str
    snapshots: tuple[Snapshot, ...]
    receipts: int
    """Finished shards, committed or not."""
    bytes: int
    changed: float | None
    """Unix time of its last change; None for what was never committed in an object store."""
    builder: Owner | None
    """Who holds its lease and lives."""

    @property
    def is_done(self) -> bool:
        """Whether some state of it was committed."""
        return bool(self.snapshots)

    @property
    def parents(self) -> frozenset[Name]:
        """What any state of it was made from, as far as it lies in a store."""
        read = (parent.folder for snapshot in self.snapshots for parent in snapshot.parents.values())
        return frozenset(name for folder in read if (name := name_of(folder)))


def name_of(folder: str) -> Name | None:
    """(stage, key) of the folder of an artifact; None for a folder outside of any store, such as weights made elsewhere."""
    parts = folder.rstrip("/").rsplit("/", 3)
    return (parts[2], parts[3]) if len(parts) == 4 and parts[1] == STORE else None


def stored(root: str) -> Iterator[Stored]:
    """Every artifact under `root`, finished or not. Raises CorruptArtifact for a snapshot that cannot be read."""
    store = storage.join(root, STORE)
    for stage in storage.list_folders(store):
        for key in storage.list_folders(storage.join(store, stage)):
            yield _stored((stage, key), storage.join(store, stage, key))


def needed(artifacts: Iterable[Stored], roots: Iterable[Name]) -> frozenset[Name]:
    """`roots`, and all that they were made from, at any distance."""
    parents = {artifact.name: artifact.parents for artifact in artifacts}
    found: set[Name] = set()
    pending = set(roots)
    while pending:
        found |= pending
        pending = {parent for name in pending for parent in parents.get(name, ())} - found
    return frozenset(found)


def _stored(name: Name, folder: str) -> Stored:
    made = tuple(snapshots(folder))
    stamps = [entry.stamp.split("-") for entry in storage.list_tree(folder) if entry.stamp]
    changed = max((datetime.fromisoformat(s.created).timestamp() for s in made if s.created), default=None)
    if storage.is_local(folder):
        written = [int(stamp[1]) / 1e9 for stamp in stamps]
        changed = max(written or [storage.local_path(folder).stat().st_mtime])
    return Stored(
        name=name,
        folder=folder,
        snapshots=made,
        receipts=len(storage.list_files(storage.join(folder, "_meta", "receipts"))),
        bytes=sum(int(stamp[0]) for stamp in stamps),
        changed=changed,
        builder=holder(folder),
    )
