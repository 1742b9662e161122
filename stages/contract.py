"""The one shape of a stage: named, versioned, columns in, columns out, a snapshot at the end."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from data import manifest, storage
from data.config import Config, operational, result_fields
from data.errors import CorruptArtifact
from data.manifest import FileRecord, Ledger, ShardRecord, Snapshot, Word
from stages import spending

STOP_SECONDS = 60
"""Between the SIGTERM of a job and its SIGKILL. Ray's default is 3."""
STOPPING_SECONDS = 45.0
"""How long a stage that is told to stop may take to keep what it has begun: what leaves time to end."""


def stopping_seconds() -> float:
    """STOPPING_SECONDS, or what DARKROOM_STOPPING_SECONDS says where whoever stops a run waits for another time."""
    return float(os.environ.get("DARKROOM_STOPPING_SECONDS", STOPPING_SECONDS))


Inputs = Mapping[str, Snapshot]
"""role -> snapshot, as the plan wired them: {"data": …, "clip": …}."""


class FanoutConfig(Config):
    """How shards are spread over workers; no part of any result."""

    num_workers: int | None = operational(
        None, ge=1, description="actors per stage; None: one per CPU of the cluster"
    )
    num_gpus: float | None = operational(
        None,
        ge=0,
        description="GPUs per actor of the stages that run networks; None: one where the cluster has any",
    )
    max_attempts: int = operational(
        3, ge=1, description="times that a shard may kill its worker before it is quarantined"
    )
    stall_seconds: float = operational(1800.0, gt=0, description="fail when no shard finishes for this long")
    lease_seconds: float = operational(
        86_400.0, gt=0, description="wait this long for another run that builds the same artifact, then fail"
    )


class JobsConfig(Config):
    """How stages run as jobs of the cluster that `--address http://…` names; no part of any result."""

    python: str = operational("python", description="the interpreter, where the cluster runs a job")
    working_dir: str | None = operational(
        None, description="folder whose code is sent to the cluster; none: Darkroom is installed there"
    )
    driver_cpus: float = operational(
        0.0, ge=0, description="CPUs held by the process that drives a stage; with 0 it runs on the head"
    )
    start_seconds: float = operational(300.0, gt=0, description="give up a job that has not begun by then")
    silence_seconds: float = operational(
        60.0, gt=0, description="give up when the cluster has not answered for this long"
    )


class Progress(Protocol):
    """Where a stage tells how far it is; thread-safe."""

    def __call__(self, done: float, total: float, unit: str, note: str = "") -> None: ...


def silent(done: float, total: float, unit: str, note: str = "") -> None:
    """A `Progress` that says nothing."""


@dataclass(frozen=True)
class Workspace:
    """Where a stage writes and how it may run."""

    folder: str
    """The artifact's folder, an fsspec URL; this stage's alone while it holds the lease."""
    fingerprint: str
    """Names the snapshot to commit."""
    fanout: FanoutConfig = field(default_factory=FanoutConfig)
    progress: Progress = silent

    @property
    def without_gpus(self) -> Workspace:
        """The same for actors that run no network, and hold no GPU that another could use."""
        return replace(self, fanout=self.fanout.model_copy(update={"num_gpus": 0.0}))


_REVISION = re.compile(r"[\w.-]+/[\w.-]+@(.+)")
"""A hub name with its revision, which is part of what is made from its weights."""


class InputRef(Config):
    """Where an input lies. `external`: weights made elsewhere, a folder or a hub name, that have no snapshot."""

    stage: str
    folder: str
    fingerprint: Word
    external: bool = False

    def open(self) -> Snapshot:
        """The snapshot; raises CorruptArtifact when it is not there any more."""
        if self.external:
            revision = _REVISION.fullmatch(self.folder)
            config = {"revision": revision[1]} if revision else {}
            return Snapshot(
                stage=self.stage, version=0, fingerprint=self.fingerprint, config=config, folder=self.folder
            )
        snapshot = manifest.load_snapshot(self.folder, self.fingerprint)
        if snapshot is None:
            raise CorruptArtifact(
                f"{self.folder} has no snapshot {self.fingerprint}: run the same command again"
            )
        return snapshot


class StageSpec(Config):
    """One stage, ready to run anywhere: what `python -m stages SPEC_URI` reads."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, InputRef]
    folder: str
    fingerprint: Word
    fanout: FanoutConfig = FanoutConfig()
    jobs: JobsConfig = JobsConfig()
    version: int | None = None
    """The stage's version where the plan was made; None: whatever it is where it runs."""
    run: str = ""
    """The run that asks for it: what logs and figures are named by."""

    def made(self) -> Snapshot | None:
        """The snapshot that this names, if it is in the store and of what its inputs hold now."""
        snapshot = manifest.load_snapshot(self.folder, self.fingerprint)
        if snapshot is None:
            return None
        parents = {role: parent.digest for role, parent in snapshot.parents.items()}
        return snapshot if parents == {role: ref.open().digest for role, ref in self.inputs.items()} else None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a pipeline. `run` may be killed at any time and run again; it commits its snapshot last.

    Told to stop by an exception that is no `Exception` (KeyboardInterrupt, and what others make of SIGTERM), it keeps what it
    has begun, within `stopping_seconds()`, and lets the exception pass.
    """

    name: str
    version: int
    """Raised when the same config and inputs give another result than before."""
    reads: Callable[[Any], frozenset[str]]
    """config -> columns needed."""
    writes: Callable[[Any], frozenset[str]]
    """config -> columns added."""
    config: type[Config]
    run: Callable[[Any, Inputs, Workspace], Snapshot]
    check: Callable[[Any], None] = lambda _: None
    """Raises UserError when the connected cluster cannot run such a config: asked of every stage before the first starts."""
    grows: bool = False
    """Its artifact gains shards as its data does: its folder is named by all that made it but the data's state."""


def commit(
    stage: Stage,
    config: Config,
    inputs: Inputs,
    workspace: Workspace,
    *,
    started: float,
    shards: tuple[ShardRecord, ...] = (),
    files: tuple[FileRecord, ...] = (),
    superseded: Ledger | None = None,
    facts: dict[str, Any] | None = None,
) -> Snapshot:
    """Publishes the stage's snapshot, last of all, and returns it. `started` is `time.monotonic()` at the stage's start."""
    snapshot = Snapshot(
        stage=stage.name,
        version=stage.version,
        fingerprint=workspace.fingerprint,
        config=result_fields(config),
        columns=tuple(sorted(stage.writes(config))),
        parents={role: parent.as_parent() for role, parent in inputs.items()},
        shards=shards,
        files=files,
        superseded=superseded or Ledger(),
        facts=facts or {},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        device_seconds=spending.spent(workspace.folder, workspace.fingerprint),
    )
    storage.remove_drafts(workspace.folder)
    published = manifest.publish_snapshot(workspace.folder, snapshot)
    spending.settle(workspace.folder, workspace.fingerprint)
    return published
