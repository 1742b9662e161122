"""From the worker that trained to the stage that commits: the files of an artifact and the facts about them.

Weights are written by libraries, which write to a disk: an object store gets their files afterwards. What was published is
handed over by name, since a listing may not show it yet.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data import storage
from data.manifest import FileRecord, file_record
from stages import model_card

PUBLISHED = "_meta/published.json"
HIDDEN = {"_meta", "checkpoints", model_card.NAME}
"""What is in no digest."""


@contextmanager
def publishing(folder: str) -> Iterator[Path]:
    """Where the files of the artifact `folder` are written: there, or on this machine where it lies in an object store."""
    if storage.is_local(folder):
        yield storage.local_path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="darkroom-") as here:
        yield Path(here)


def publish(here: Path, folder: str, facts: dict[str, Any]) -> None:
    """Brings what was written `here` to the artifact `folder`, and notes it together with the `facts`."""
    files = published(here)
    if not storage.is_local(folder):
        for file in files:
            storage.publish_file(here / file.path, storage.join(folder, file.path))
    note = {"facts": facts, "files": [file.model_dump(mode="json") for file in files]}
    storage.write_bytes(storage.join(folder, PUBLISHED), json.dumps(note).encode())


def noted(folder: str) -> tuple[dict[str, Any], tuple[FileRecord, ...]]:
    """The facts and the files that `publish` noted."""
    note = json.loads(storage.read_bytes(storage.join(folder, PUBLISHED)))
    return note["facts"], tuple(FileRecord.model_validate(file) for file in note["files"])


def published(folder: Path) -> tuple[FileRecord, ...]:
    """The files under `folder` that the artifact consists of, in order."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return tuple(file_record(str(folder), p.as_posix()) for p in paths if p.parts[0] not in HIDDEN)
