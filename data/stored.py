"""The artifacts under a root: where each lies, how far it is, who builds it, and what it was made from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from data import storage
from data.errors import CorruptArtifact
from data.lease import Owner, holder
from data.manifest import START, Snapshot, snapshots

STORE = "store"
LEASE = "lease."
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
    step: int
    """Of a training's newest checkpoint; 0 where it has none."""
    changed: float | None
    """Unix time of its last change; None for what was never committed in an object store."""
    builder: Owner | None
    """Who holds its lease and lives."""
    is_damaged: bool = False
    """Some snapshot cannot be read."""
    is_linked: bool = False
    """It lies outside of the store, behind a link."""

    @property
    def is_done(self) -> bool:
        """Whether some state of it was committed."""
        return bool(self.snapshots)

    @property
    def parents(self) -> frozenset[Name]:
        """What any state of it was made from, as far as it lies in a store; without weights that a training began with."""
        links = (link for snapshot in self.snapshots for link in snapshot.parents.items())
        return frozenset(name for role, parent in links if role != START and (name := name_of(parent.folder)))


def name_of(folder: str) -> Name | None:
    """(stage, key) of the folder of an artifact; None for a folder outside of any store, such as weights made elsewhere."""
    parts = folder.rstrip("/").rsplit("/", 3)
    is_name = len(parts) == 4 and parts[1] == STORE and ".." not in parts[2:]
    return (parts[2], parts[3]) if is_name else None


def under(root: str, folder: str) -> str:
    """Where the artifact `folder` of some root lies under `root`, which may have been moved since; one of no store, where it is."""
    name = name_of(folder)
    return storage.join(root, STORE, *name) if name else folder


def stored(root: str) -> Iterator[Stored]:
    """Every artifact under `root`, finished or not: the folders `store/STAGE/KEY` that have a `_meta`."""
    store = storage.join(root, STORE)
    for stage in storage.list_folders(store):
        for key in storage.list_folders(storage.join(store, stage)):
            folder = storage.join(store, stage, key)
            if storage.is_folder(storage.join(folder, "_meta")):
                yield _stored((stage, key), folder, _is_behind_a_link(store, folder))


def remove(folder: str) -> None:
    """Removes an artifact: its snapshots first, so that what is half removed is not there, its `_meta` last, so that it is
    still known for what it is; of that the lease last, since who finds none may begin to build."""
    meta = storage.join(folder, "_meta")
    _empty(storage.join(meta, "snapshots"))
    for name in storage.list_folders(folder):
        if name != "_meta":
            storage.remove_tree(storage.join(folder, name))
    _empty(folder)
    for name in storage.list_folders(meta):
        storage.remove_tree(storage.join(meta, name))
    _empty(meta, but=LEASE)
    storage.remove_tree(folder)


def _empty(folder: str, but: str = "/") -> None:
    """Removes the files of `folder` itself, those whose names begin with `but` excepted."""
    for name in storage.list_files(folder):
        if not name.startswith(but):
            storage.remove(storage.join(folder, name))


def needed(artifacts: Iterable[Stored], roots: Iterable[Name]) -> frozenset[Name]:
    """`roots`, and all that they were made from, at any distance."""
    parents = {artifact.name: artifact.parents for artifact in artifacts}
    found: set[Name] = set()
    pending = set(roots)
    while pending:
        found |= pending
        pending = {parent for name in pending for parent in parents.get(name, ())} - found
    return frozenset(found)


def _is_behind_a_link(store: str, folder: str) -> bool:
    if not storage.is_local(store):
        return False
    return not storage.local_path(folder).resolve().is_relative_to(storage.local_path(store).resolve())


def _stored(name: Name, folder: str, is_linked: bool) -> Stored:
    try:
        made, is_damaged = tuple(snapshots(folder)), False
    except CorruptArtifact:
        made, is_damaged = (), True
    stamps = [entry.stamp.split("-", 1) for entry in storage.list_tree(folder) if entry.stamp]
    changed = max((datetime.fromisoformat(s.created).timestamp() for s in made if s.created), default=None)
    if storage.is_local(folder):
        changed = max((int(stamp[1]) / 1e9 for stamp in stamps), default=time.time())
    return Stored(
        name=name,
        folder=folder,
        snapshots=made,
        receipts=len(storage.list_files(storage.join(folder, "_meta", "receipts"))),
        step=max((int(name[5:]) for name in _checkpoints(folder)), default=0),
        bytes=sum(int(stamp[0]) for stamp in stamps),
        changed=changed,
        builder=holder(folder),
        is_damaged=is_damaged,
        is_linked=is_linked,
    )


def _checkpoints(folder: str) -> list[str]:
    there = storage.list_folders(storage.join(folder, "checkpoints"))
    return [name for name in there if name.startswith("step_") and name[5:].isdigit()]
