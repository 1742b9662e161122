"""Features of real pictures that an earlier evaluation of the same data holds: copied, so that the points of a sweep share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data import columns, manifest, storage
from data.errors import CorruptArtifact
from data.manifest import Snapshot
from stages.contract import Inputs
from stages.fanout import ShardTask, finished


def borrow(
    tasks: Sequence[ShardTask], folder: str, *, version: int, facts: Mapping[str, Any], inputs: Inputs
) -> int:
    """Puts files and receipts of `tasks` into `folder` from a finished artifact beside it; returns how many.

    The lender is of the same version, has the same `facts` and the same `data` and `embed`, and under the index of each task
    the same pictures. A file that is missing or has changed is left to be made.
    """
    missing = [task for task in tasks if task.index not in finished(tasks, folder)]
    lender = next(_lenders(folder, version, facts, inputs), None) if missing else None
    if lender is None:
        return 0
    records = {record.index: record for record in lender.shards}
    borrowed = 0
    for task in missing:
        record = records[task.index]
        if all(_copied(lender.folder, folder, file) for file in record.files):
            manifest.publish_receipt(folder, record.model_copy(update={"parents": dict(task.parents)}))
            borrowed += 1
    return borrowed


def _lenders(folder: str, version: int, facts: Mapping[str, Any], inputs: Inputs) -> Iterator[Snapshot]:
    family, _, own = folder.rstrip("/").rpartition("/")
    for name in storage.list_folders(family):
        try:
            made = manifest.snapshots(storage.join(family, name)) if name != own else []
        except CorruptArtifact:
            continue
        for snapshot in made:
            same = all(
                role in snapshot.parents and snapshot.parents[role].digest == inputs[role].digest
                for role in ("data", "embed")
            )
            if same and snapshot.version == version and snapshot.facts.get("reference") == facts:
                yield snapshot


def _copied(lender: str, folder: str, file: manifest.FileRecord) -> bool:
    try:
        payload = storage.read_bytes(storage.join(lender, file.path))
    except FileNotFoundError:
        return False
    return columns.publish(folder, file.path, payload) == file
