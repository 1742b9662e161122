"""What lies under a root and what of it is still wanted: `darkroom status`, `gc` and `pin`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from data import storage
from data.errors import CorruptArtifact, UserError
from data.lease import Owner, is_alive, lease
from data.stored import Name, Stored, name_of, needed, stored
from flows import runs
from training.metrics.gates import Against, parsed

PINNED = "pinned"


@dataclass(frozen=True)
class Run:
    """A run's record, or what a run that has not ended left."""

    name: str
    state: str
    """finished, failed (a gate did), running, or stopped (the same command resumes it)."""
    finished: str
    """UTC, ISO 8601; empty for one that has not ended."""
    pinned: bool
    artifacts: frozenset[Name]
    baselines: frozenset[str] = frozenset()
    """Runs that its gates hold it against."""


def status(root: str) -> dict[str, Any]:
    """What `status --json` prints: every run from the newest on, and every artifact with its size and who wants it."""
    known, artifacts = _runs(root), list(stored(root))
    wanted = {run.name: needed(artifacts, run.artifacts) for run in known}
    return {
        "root": root,
        "pointers": runs.pointed(root),
        "runs": [
            {"run": r.name, "state": r.state, "finished": r.finished, "pinned": r.pinned} for r in known
        ],
        "artifacts": [
            _row(artifact, [run for run, names in wanted.items() if artifact.name in names])
            for artifact in artifacts
        ],
        "bytes": sum(artifact.bytes for artifact in artifacts),
    }


def collect(root: str, *, keep_runs: int | None, older_than: float, dry_run: bool) -> dict[str, Any]:
    """Removes what no run wants and nothing touched for `older_than` seconds; returns what `gc --json` prints.

    With `keep_runs`, the records of all but that many of the newest runs go first; those that `latest`, `production` or a gate of a
    kept run names, pinned, running and stopped ones stay. Raises UserError, having removed nothing, while somebody builds an artifact under `root`.
    """
    with lease(storage.join(root, runs.KEEPING)):
        return _collected(root, keep_runs, older_than, dry_run)


def _collected(root: str, keep_runs: int | None, older_than: float, dry_run: bool) -> dict[str, Any]:
    known, artifacts = _runs(root), list(stored(root))
    _refuse_busy(root, known, artifacts)
    dropped = _dropped(root, known, keep_runs)
    wanted = needed(artifacts, {name for run in known if run not in dropped for name in run.artifacts})
    before = time.time() - older_than
    doomed = [a for a in artifacts if a.name not in wanted and a.changed is not None and a.changed < before]
    if not dry_run:
        for run in dropped:
            storage.remove_tree(storage.join(root, run.name))
        for artifact in doomed:
            _remove(artifact)
    return {
        "root": root,
        "dry_run": dry_run,
        "runs": [run.name for run in dropped],
        "artifacts": [_row(artifact, []) for artifact in doomed],
        "bytes": sum(artifact.bytes for artifact in doomed),
        "kept": len(artifacts) - len(doomed),
        "young": len([a for a in artifacts if a.name not in wanted]) - len(doomed),
    }


def pin(root: str, name: str, *, pinned: bool) -> str:
    """Keeps the run `name` from every `gc`, or no longer; returns its name. Raises UserError when there is no such run."""
    run = runs.find(root, name)["run"]
    mark = storage.join(root, run, PINNED)
    if pinned:
        storage.write_bytes(mark, b"")
    else:
        storage.remove(mark)
    return run


def _runs(root: str) -> list[Run]:
    """Newest first, those that have not ended before them."""
    found = [_run(root, name) for name in storage.list_folders(root)]
    return sorted((run for run in found if run), key=lambda run: run.finished or "~", reverse=True)


def _run(root: str, name: str) -> Run | None:
    folder = storage.join(root, name)
    started = storage.join(folder, runs.STARTED)
    has_started = storage.exists(started)
    if not has_started and not storage.exists(storage.join(folder, runs.RECORD)):
        return None
    pinned = storage.exists(storage.join(folder, PINNED))
    sweeps = {name_of(point.uri) for sweep in runs.sweeps(folder) for point in sweep.points}
    if has_started:
        record = _read(started)
        state = "running" if is_alive(Owner.model_validate(record["owner"])) else "stopped"
        return Run(name, state, "", pinned, _names(record) | (sweeps - {None}))
    record = runs.find(root, name)
    try:
        is_failed = any(stage["status"] == "failed" for stage in record["stages"])
        gates = [parsed(gate) for gate in record["recipe"]["evaluate"]["gates"]]
        state, finished, names = "failed" if is_failed else "finished", record["finished"], _names(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{storage.join(folder, runs.RECORD)} does not say what the run is made of: run its recipe again, or remove the "
            "folder"
        ) from error
    baselines = frozenset(gate.run for gate in gates if isinstance(gate, Against))
    return Run(name, state, finished, pinned, names | (sweeps - {None}), baselines)


def _read(path: str) -> dict[str, Any]:
    try:
        record = json.loads(storage.read_bytes(path))
        Owner.model_validate(record["owner"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CorruptArtifact(f"{path} cannot be read: remove it and run its recipe again") from error
    return record


def _names(record: dict[str, Any]) -> frozenset[Name]:
    folders = [*record["folders"].values(), *record.get("external", {}).values()]
    return frozenset(name for folder in folders if (name := name_of(folder)))


def _refuse_busy(root: str, known: Sequence[Run], artifacts: Sequence[Stored]) -> None:
    for artifact in artifacts:
        if artifact.builder:
            raise UserError(
                f"process {artifact.builder.pid} on {artifact.builder.host} is building {artifact.folder}: nothing was removed; "
                "wait for it, or end it"
            )
    if running := [run.name for run in known if run.state == "running"]:
        raise UserError(
            f"run {', '.join(running)} under {root} is running: nothing was removed; wait for it, or end it"
        )


def _dropped(root: str, known: Sequence[Run], keep_runs: int | None) -> list[Run]:
    if keep_runs is None:
        return []
    pointed = set(runs.pointed(root).values())
    ended = [run for run in known if run.finished]
    old = [run for run in ended[keep_runs:] if not run.pinned and run.name not in pointed]
    while held := {b for run in known if run not in old for b in run.baselines} & {run.name for run in old}:
        old = [run for run in old if run.name not in held]
    return old


def _remove(artifact: Stored) -> None:
    """Its snapshots first: what is half removed is not there. Of an artifact that lies elsewhere, the link alone."""
    if storage.is_local(artifact.folder) and storage.local_path(artifact.folder).is_symlink():
        storage.remove_tree(artifact.folder)
        return
    for snapshot in artifact.snapshots:
        storage.remove(storage.join(artifact.folder, "_meta", "snapshots", f"{snapshot.fingerprint}.json"))
    storage.remove_tree(artifact.folder)


def _row(artifact: Stored, wanted_by: list[str]) -> dict[str, Any]:
    newest = max(artifact.snapshots, key=lambda s: (len(s.shards), s.created), default=None)
    return {
        "stage": artifact.name[0],
        "key": artifact.name[1],
        "state": "being built" if artifact.builder else "done" if newest else "unfinished",
        "shards": max(artifact.receipts, len(newest.shards) if newest else 0),
        "samples": newest.samples if newest else 0,
        "bytes": artifact.bytes,
        "changed": artifact.changed,
        "builder": f"process {artifact.builder.pid} on {artifact.builder.host}" if artifact.builder else None,
        "wanted_by": wanted_by,
        "uri": artifact.folder,
    }
