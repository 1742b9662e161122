"""Evaluation prompts: the source's own list when it brought one, captions of the dataset otherwise."""

from __future__ import annotations

import numpy as np

from data import storage
from data.loader import ColumnSet
from data.manifest import Snapshot
from data.sources import Prompt

FILE = "_meta/prompts.jsonl"
"""Beside the shards, or beside generated images: one Prompt per line."""


def read_prompts(folder: str) -> list[Prompt]:
    """The prompts stored in the artifact `folder`, in order; empty where it has none."""
    path = storage.join(folder, FILE)
    if not storage.exists(path):
        return []
    return [Prompt.model_validate_json(line) for line in storage.read_bytes(path).splitlines()]


def write_prompts(folder: str, prompts: list[Prompt]) -> None:
    """Stores `prompts` in the artifact `folder`."""
    storage.write_bytes(
        storage.join(folder, FILE), "".join(p.model_dump_json() + "\n" for p in prompts).encode()
    )


def evaluation_prompts(data: Snapshot, count: int) -> list[Prompt]:
    """The first `count` prompts of the dataset's list, or evenly spaced captions when it has none; repeated if too few."""
    listed = read_prompts(data.folder)
    if not listed:
        columns = ColumnSet([data])
        indices = np.linspace(0, len(columns) - 1, min(count, len(columns))).round().astype(int)
        listed = [Prompt(text=text) for text in columns.captions(indices)]
    return [listed[i % len(listed)] for i in range(count)]
