"""Runs side by side: their scores under one protocol, paired differences from the first, and what does not compare."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from data import storage
from data.errors import CorruptArtifact, UserError
from flows import runs
from flows.recipes import Recipe
from stages.contract import InputRef
from stages.evaluate import SCORES
from training.metrics.comparison import Measured, difference
from training.metrics.gates import Against, parsed
from training.metrics.protocol import SUBJECT, Protocol, differences


def compare(root: str, names: Sequence[str], *, vary: Collection[str] = ()) -> dict[str, Any]:
    """What `compare --json` prints: {"runs", "metrics": [one per metric under one protocol], "incomparable"}.

    The first run is what the others are held against. Raises UserError for fewer than two runs, a run without scores, a
    name in `vary` that no protocol has, and when no metric at all was measured under one protocol.
    """
    if len(names) < 2:
        raise UserError("compare needs at least two runs: name the one to hold the others against first")
    measured = {name: measured_of(root, name) for name in names}
    if len({os.path.realpath(name) if name.endswith(".json") else name for name in names}) < len(names):
        raise UserError(f"compare {' '.join(names)}: a run is named twice; name different runs")
    table = side_by_side(measured, vary)
    if not table["metrics"]:
        raise UserError(_refusal(names, table["incomparable"]))
    return table


def side_by_side(
    measured: Mapping[str, Mapping[str, Measured]], vary: Collection[str] = ()
) -> dict[str, Any]:
    """As `compare`, of scores by run and metric; nothing that compares is an answer too."""
    (_, first), *_ = measured.items()
    shared = [metric for metric in first if all(metric in scores for scores in measured.values())]
    table: dict[str, Any] = {"runs": list(measured), "metrics": [], "incomparable": []}
    for metric in shared:
        rows = {name: scores[metric] for name, scores in measured.items()}
        apart = _apart(rows, {*SUBJECT, *vary})
        table["incomparable" if apart else "metrics"].append(_row(metric, rows, apart, {*SUBJECT, *vary}))
    return table


def measured_of(root: str, name: str) -> dict[str, Measured]:
    """The scores of run `name`, or of the file NAME.json that `darkroom score --json` printed, with their protocols; UserError
    when it has none, or older ones without a protocol."""
    if name.endswith(".json"):
        return _scored(name)
    record = runs.find(root, name)
    folder = record["folders"].get("evaluate")
    if not folder or not storage.exists(storage.join(folder, SCORES)):
        raise UserError(
            f"run {record['run']} has no evaluation: run its recipe again without --until or --only"
        )
    if any("protocol" not in row for row in _rows(folder)):
        raise UserError(f"run {record['run']} was evaluated without protocols: run its recipe again")
    return measured_in(folder)


def _scored(path: str) -> dict[str, Measured]:
    if not storage.exists(path):
        raise UserError(
            f"{path} does not exist: give a file that `darkroom score --json` was redirected to, or a run"
        )
    try:
        rows = json.loads(storage.read_bytes(path))["scores"]
        for row in rows:
            row["protocol"].pop("digest", None)
        return {row["name"]: Measured.model_validate(row) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what `darkroom score --json` prints ({str(error).splitlines()[0]}): redirect its output to a file"
        ) from error


def measured_in(folder: str) -> dict[str, Measured]:
    """The scores of the evaluation that lies in `folder`. Raises CorruptArtifact where they cannot be read."""
    try:
        return {row["name"]: Measured.model_validate(row) for row in _rows(folder)}
    except (KeyError, ValidationError) as error:
        raise _unreadable(folder) from error


def _rows(folder: str) -> list[dict[str, Any]]:
    try:
        return [{**row} for row in json.loads(storage.read_bytes(storage.join(folder, SCORES)))["scores"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder) from error


def _unreadable(folder: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"{storage.join(folder, SCORES)} holds no scores: run `darkroom verify --repair {folder}`"
    )


def baselines_of(recipe: Recipe, root: str) -> dict[str, InputRef]:
    """run -> its evaluation, of every run that a gate of `recipe` names; UserError when there is none."""
    found = {}
    for gate in map(parsed, recipe.evaluate.gates):
        if isinstance(gate, Against):
            measured_of(root, gate.run)
            folder = runs.find(root, gate.run)["folders"]["evaluate"]
            found[gate.run] = InputRef(stage="baseline", folder=folder, fingerprint=folder.rsplit("/", 1)[1])
    return found


def _apart(rows: Mapping[str, Measured], ignoring: Collection[str]) -> list[str]:
    (_, first), *others = rows.items()
    return list(
        dict.fromkeys(d for _, row in others for d in _differences(first.protocol, row.protocol, ignoring))
    )


def _differences(a: Protocol, b: Protocol, ignoring: Collection[str]) -> list[str]:
    try:
        return differences(a, b, ignoring=ignoring)
    except ValueError as error:
        raise UserError(f"--vary: {error}") from error


def _row(
    metric: str, rows: Mapping[str, Measured], apart: Sequence[str], ignoring: Collection[str]
) -> dict[str, Any]:
    (_, first), *others = rows.items()
    values = {
        name: {
            "value": row.value,
            "low": row.low,
            "high": row.high,
            "n": row.n,
            "protocol": row.protocol.digest,
        }
        for name, row in rows.items()
    }
    row: dict[str, Any] = {"name": metric, "better": first.better, "values": values}
    if apart:
        return row | {"differences": list(apart)}
    held = {name: difference(first, other, ignoring=ignoring).model_dump() for name, other in others}
    return row | {"against_first": held}


def _refusal(names: Sequence[str], incomparable: Sequence[Mapping[str, Any]]) -> str:
    if not incomparable:
        return f"{' and '.join(names)} have no score in common: nothing to compare"
    sentences = "; ".join(f"{row['name']} ({', '.join(row['differences'][:3])})" for row in incomparable)
    return (
        f"{' and '.join(names)} were measured under different protocols, and their scores do not compare: {sentences}; "
        "evaluate them alike, or name what is under comparison with --vary"
    )
