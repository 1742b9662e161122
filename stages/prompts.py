"""Evaluation prompts: the source's own list when it brought one, captions of the dataset otherwise."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np

from data import storage
from data.errors import UserError
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


def listed_prompts(path: str) -> list[Prompt]:
    """The prompts of a manifest, in order: a .txt with one a line, a .jsonl of Prompts or of {"caption": …}, or a .tsv or
    .csv with a column `caption`. Raises UserError when it cannot be read so, or a prompt is empty."""
    try:
        text = storage.read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"evaluate.prompts={path} cannot be read ({error}): give a text file of prompts"
        ) from error
    kind = path.rsplit(".", 1)[-1].lower()
    try:
        found = [_prompt(row) for row in _rows(text, kind)]
    except (KeyError, TypeError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"evaluate.prompts={path} holds no prompts ({str(error).splitlines()[0]}): give a .txt with one a line, a .jsonl "
            "with text or caption in each line, or a .tsv or .csv with a column caption"
        ) from error
    if empty := [at for at, prompt in enumerate(found) if not prompt.text.strip()]:
        raise UserError(f"evaluate.prompts={path}: prompt {empty[0] + 1} is empty; take it out")
    return found


def _rows(text: str, kind: str) -> list[Any]:
    if kind == "jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if kind in ("tsv", "csv"):
        return list(csv.DictReader(text.splitlines(), delimiter="\t" if kind == "tsv" else ","))
    return [{"text": line.strip()} for line in text.splitlines() if line.strip()]


def _prompt(row: Any) -> Prompt:
    return Prompt(text=row["caption"]) if "caption" in row else Prompt.model_validate(row)


def evaluation_prompts(data: Snapshot, count: int, manifest: str | None = None) -> list[Prompt]:
    """The first `count` prompts of `manifest`, which must have them; without one those of the dataset's list, or evenly
    spaced captions when it has none, repeated if too few."""
    if manifest is not None:
        return listed_prompts(manifest)[:count]
    listed = read_prompts(data.folder)
    if not listed:
        columns = ColumnSet([data])
        indices = np.linspace(0, len(columns) - 1, min(count, len(columns))).round().astype(int)
        listed = [Prompt(text=text) for text in columns.captions(indices)]
    return [listed[i % len(listed)] for i in range(count)]
