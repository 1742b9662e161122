"""What lies under a root and what of it is still wanted: `darkroom status`, `gc` and `pin`."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from data import storage
from data.errors import CorruptArtifact, LeaseHeld, UserError
from data.lease import Owner, is_alive, lease
from data.stored import STORE, Name, Stored, name_of, needed, remove, stored
from flows import pointers, runs
from training.metrics.gates import Against, parsed
from training.metrics.tradeoff import Sweep

PINNED = "pinned"


class Busy(UserError):
    """Somebody works under the root, so that nothing there may go."""


class Stage(BaseModel):
    """A stage of a run's record."""

    status: str


class Record(BaseModel):
    """What `run.json` and `started.json` say of a run, as far as keeping needs it."""

    folders: dict[str, str]
    external: dict[str, str] = {}
    stages: list[Stage] = []
    recipe: dict[str, Any] = {}
    finished: str = ""
    owner: Owner | None = None

    @property
    def names(self) -> set[Name]:
        """Artifacts of a store that the run names; a source may lie in one."""
        source = str((self.recipe.get("source") or {}).get("path") or "")
        places = [*self.folders.values(), *self.external.values(), source, source.rpartition("/")[0]]
        return {name for place in places if (name := name_of(place))}

    @property
    def baselines(self) -> set[str]:
        """Runs that its gates hold it against."""
        gates = map(parsed, (self.recipe.get("evaluate") or {}).get("gates") or ())
        return {gate.run for gate in gates if isinstance(gate, Against)}


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    name: str
    state: str
    """finished, failed (a gate did), running, or stopped (the same command resumes it)."""
    finished: str
    """UTC, ISO 8601; empty for one that has not ended."""
    pinned: bool
    artifacts: frozenset[Name]
    baselines: frozenset[str]


def status(root: str) -> dict[str, Any]:
    """What `status --json` prints: every run from the newest on, and every artifact with its size and who wants it."""
    known, artifacts = _runs(root), list(stored(root))
    wanted = {run.name: needed(artifacts, run.artifacts) for run in known}
    return {
        "root": root,
        "pointers": pointers.pointed(root),
        "runs": [
            {"run": r.name, "state": r.state, "finished": r.finished, "pinned": r.pinned} for r in known
        ],
        "artifacts": [
            _row(artifact, [run for run, names in wanted.items() if artifact.name in names])
            for artifact in artifacts
        ],
        "bytes": sum(artifact.bytes for artifact in artifacts),
    }


def collect(
    root: str, *, keep_runs: int | None, forget: Collection[str], older_than: float, dry_run: bool
) -> dict[str, Any]:
    """Removes what no run wants and nothing touched for `older_than` seconds; returns what `gc --json` prints.

    With `keep_runs`, the records of all but that many of the newest runs go first; those that a pointer or a gate of a kept
    run names, pinned, running and stopped ones stay. `forget` names runs that go whatever their age. What lies behind a link
    is never removed. Raises Busy, having removed nothing, while somebody builds an artifact under `root`.
    """
    if dry_run or not storage.exists(root):
        return _collected(root, keep_runs, forget, older_than, dry_run=True) | {"dry_run": dry_run}
    with runs.keeping(root):
        return _collected(root, keep_runs, forget, older_than, dry_run=False)


def pin(root: str, name: str, *, pinned: bool) -> str:
    """Keeps the run `name` from every `gc`, or no longer; returns its name. Raises UserError when there is no such run."""
    run = runs.named(root, name)
    mark = storage.join(root, run, PINNED)
    with runs.keeping(root):
        if pinned:
            storage.write_bytes(mark, b"")
        else:
            storage.remove(mark)
    return run


def _collected(
    root: str, keep_runs: int | None, forget: Collection[str], older_than: float, *, dry_run: bool
) -> dict[str, Any]:
    known, artifacts = _runs(root), list(stored(root))
    _refuse_busy(known, artifacts)
    dropped = _dropped(root, known, keep_runs, forget)
    kept = {name for run in known if run not in dropped for name in run.artifacts}
    before = time.time() - older_than
    young = {a.name for a in artifacts if a.changed is None or a.changed >= before or a.is_linked}
    wanted = needed(artifacts, kept)
    doomed = [a for a in artifacts if a.name not in needed(artifacts, kept | young)]
    if not dry_run:
        for run in dropped:
            _forget(storage.join(root, run.name))
        doomed = [artifact for artifact in doomed if _removed(root, artifact)]
    return {
        "root": root,
        "dry_run": dry_run,
        "runs": [run.name for run in dropped],
        "artifacts": [_row(artifact, []) for artifact in doomed],
        "bytes": sum(artifact.bytes for artifact in doomed),
        "kept": len(artifacts) - len(doomed),
        "young": len(artifacts) - len(doomed) - len([a for a in artifacts if a.name in wanted]),
    }


def _runs(root: str) -> list[Run]:
    """Newest first, those that have not ended before them."""
    _refuse_lost_links(root)
    names = [name for name in storage.list_folders(root) if name != STORE and not name.startswith(".")]
    found = [run for name in names if (run := _run(root, name))]
    return sorted(found, key=lambda run: run.finished or "~", reverse=True)


def _refuse_lost_links(root: str) -> None:
    if not storage.is_local(root) or not storage.local_path(root).is_dir():
        return
    for path in storage.local_path(root).iterdir():
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link that leads nowhere, so what its run wants is not known: mend or remove it"
            )


def _run(root: str, name: str) -> Run | None:
    folder = storage.join(root, name)
    started = _read(storage.join(folder, runs.STARTED))
    ended = _read(storage.join(folder, runs.RECORD))
    if started is None and ended is None:
        return None
    records = [record for record in (started, ended) if record]
    try:
        names = {name for record in records for name in record.names}
        baselines = frozenset(run for record in records for run in record.baselines)
    except (ValueError, TypeError, AttributeError) as error:
        raise _unreadable(storage.join(folder, runs.RECORD)) from error
    points = {name_of(point.uri) for sweep in _sweeps(folder) for point in sweep.points}
    if started:
        state = "running" if started.owner and is_alive(started.owner) else "stopped"
    else:
        is_failed = ended is not None and any(stage.status == "failed" for stage in ended.stages)
        state = "failed" if is_failed else "finished"
    finished = ended.finished if ended and not started else ""
    pinned = storage.exists(storage.join(folder, PINNED))
    return Run(name, state, finished, pinned, frozenset(names | (points - {None})), baselines)


def _read(path: str) -> Record | None:
    try:
        return Record.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error


def _sweeps(folder: str) -> Sequence[Sweep]:
    try:
        return runs.sweeps(folder)
    except ValidationError as error:
        raise _unreadable(storage.join(folder, "sweep_….json")) from error


def _unreadable(path: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"{path} cannot be read, so what its run wants is not known: run its recipe again, or remove its folder"
    )


def _refuse_busy(known: Sequence[Run], artifacts: Sequence[Stored]) -> None:
    for artifact in artifacts:
        if artifact.builder:
            raise Busy(
                f"process {artifact.builder.pid} on {artifact.builder.host} is building {artifact.folder}: nothing was removed; "
                "wait for it, or end it"
            )
        if artifact.is_damaged:
            raise UserError(
                f"{artifact.folder} has a snapshot that cannot be read, so what it was made from is not known: nothing was "
                f"removed; run `darkroom verify --repair {artifact.folder}`, or remove it"
            )
    if running := [run.name for run in known if run.state == "running"]:
        raise Busy(f"run {', '.join(running)} is running: nothing was removed; wait for it, or end it")


def _dropped(root: str, known: Sequence[Run], keep_runs: int | None, forget: Collection[str]) -> list[Run]:
    serving = {*pointers.pointed(root).values(), *pointers.served_before(root)}
    forget = {runs.named(root, name) for name in forget}
    if needed_by := forget & serving:
        raise UserError(f"--forget {', '.join(sorted(needed_by))}: latest, production or a rollback needs it")
    ended = [run for run in known if run.finished][keep_runs:] if keep_runs else []
    old = [run for run in ended if not run.pinned and run.name not in serving]
    while held := {b for run in known if run not in old for b in run.baselines} & {run.name for run in old}:
        old = [run for run in old if run.name not in held]
    return old + [run for run in known if run.name in forget and run not in old]


def _forget(folder: str) -> None:
    """Removes a run's folder, what names its artifacts last of all; of a link, the link alone."""
    if not (storage.is_local(folder) and storage.local_path(folder).is_symlink()):
        for name in storage.list_files(folder):
            if name not in (runs.RECORD, runs.STARTED):
                storage.remove(storage.join(folder, name))
    storage.remove_tree(folder)


def _removed(root: str, artifact: Stored) -> bool:
    """Whether the artifact went: not when a run has begun to build or to want it since."""
    try:
        with lease(artifact.folder, patience=0.0):
            begun = [run for run in _runs(root) if run.state == "running"]
            if any(artifact.name in run.artifacts for run in begun):
                return False
            remove(artifact.folder)
            return True
    except LeaseHeld:
        return False


def _row(artifact: Stored, wanted_by: list[str]) -> dict[str, Any]:
    newest = max(artifact.snapshots, key=lambda s: (len(s.shards), s.created), default=None)
    state = "done" if newest else "unfinished"
    return {
        "stage": artifact.name[0],
        "key": artifact.name[1],
        "state": "being built" if artifact.builder else "damaged" if artifact.is_damaged else state,
        "shards": max(artifact.receipts, len(newest.shards) if newest else 0),
        "samples": newest.samples if newest else 0,
        "step": artifact.step,
        "bytes": artifact.bytes,
        "changed": artifact.changed,
        "builder": f"process {artifact.builder.pid} on {artifact.builder.host}" if artifact.builder else None,
        "wanted_by": wanted_by,
        "uri": artifact.folder,
    }
