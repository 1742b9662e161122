"""Runs: a plan carried out, its record under the root, and looking one up again."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from data import storage
from data.errors import CorruptArtifact, DarkroomError, GateFailed, StageFailed, UserError
from data.lease import Owner, lease, this_process
from data.manifest import load_snapshot
from data.stored import under
from flows import console, embedded_prefect, pins, pointers, weights
from flows.graph import refuse_too_few
from flows.plan import Plan, PlannedStage
from stages import logs
from stages.cluster import cluster
from stages.contract import StageSpec
from stages.jobs import is_job_server
from stages.report import ReportConfig
from training.metrics.scores import Score
from training.metrics.tradeoff import Sweep

RECORD = "run.json"
KEEPING = ".keeping"
"""Whose lease they hold who forget runs or move the pointer."""
PATIENCE_SECONDS = 600.0
STARTED = "started.json"
"""Of a run that has not ended: what it works on, and who it is. `gc` keeps that."""


class _Stage(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str
    status: str


class _Record(BaseModel):
    """What everyone who reads `run.json` relies on."""

    model_config = ConfigDict(extra="allow")
    run: str
    root: str = ""
    """Where it was made; the root may have been moved since."""
    stages: list[_Stage] = []
    folders: dict[str, str] = {}
    external: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    metrics: dict[str, dict[str, Any]] = {}
    report: str | None = None

    def at(self, root: str, name: str) -> dict[str, Any]:
        """The record, its places under `root` where they lay under the root that the run was made in."""
        own = f"{self.root}/"
        external = {
            r: under(root, f) if self.root and f.startswith(own) else f for r, f in self.external.items()
        }
        moved = {
            "root": root,
            "folders": {stage: under(root, folder) for stage, folder in self.folders.items()},
            "external": external,
            "report": self.report and storage.join(root, name, "report.html"),
        }
        return self.model_dump() | moved


def carry_out(plan: Plan, *, names: Sequence[str], address: str, verbose: bool) -> dict[str, Any]:
    """Runs the pending stages among `names`; returns what `run --json` prints. Nothing starts when nothing is pending."""
    started = time.monotonic()
    wanted = [stage for stage in plan.stages if stage.name in names]
    pending = [stage for stage in wanted if stage.status == "pending"]
    seconds: dict[str, float] = {}
    if pending:
        weights.require(pending, plan.root)
        refuse_too_few([stage.node for stage in pending], plan.stages[0].node)
        note_start(plan.root, plan.run, [plan])
        try:
            seconds = run_stages(plan, pending, address=address, verbose=verbose)
        except GateFailed as error:
            raise _refused(plan, wanted, error, time.monotonic() - started) from error
    stages = [
        {
            "name": stage.name,
            "status": "ran" if stage.name in seconds else "cached",
            "seconds": round(seconds.get(stage.name, 0.0), 3),
            "uri": stage.folder,
        }
        for stage in wanted
    ]
    record = {"run": plan.run, "root": plan.root, "stages": stages, **_outcome(plan)}
    if pending or not _is_kept(plan):
        _keep(plan, record, time.monotonic() - started)
    storage.write_bytes(storage.join(plan.root, pointers.LATEST), plan.run.encode())
    storage.remove(storage.join(plan.root, plan.run, STARTED))
    return record


def ledgers(plan: Plan) -> list[dict[str, Any]]:
    """Of every stage that is made and counts rows: its name, attempted and written rows, and those filtered and failed by reason."""
    made = (load_snapshot(stage.folder, stage.fingerprint) for stage in plan.stages)
    return [
        {"stage": snapshot.stage, "attempted": snapshot.ledger.attempted, **snapshot.ledger.model_dump()}
        for snapshot in made
        if snapshot and snapshot.ledger.attempted
    ]


def _refused(plan: Plan, wanted: Sequence[PlannedStage], error: GateFailed, seconds: float) -> GateFailed:
    """Keeps the record and the page of a run that failed a gate, and leaves `latest` as it is; returns what to raise."""
    stages = [
        {"name": s.name, "status": "failed" if s.name == "report" else s.status.replace("pending", "ran")}
        | {"seconds": 0.0, "uri": s.folder}
        for s in wanted
    ]
    record = {"run": plan.run, "root": plan.root, "stages": stages, **_outcome(plan)}
    _keep(plan, record, seconds)
    storage.remove(storage.join(plan.root, plan.run, STARTED))
    return GateFailed(f"{error}; the report is {record['report']}")


def find(root: str, name: str) -> dict[str, Any]:
    """The record of the run `name`, or of the one that `latest` or `production` points to; raises UserError naming the runs
    that there are."""
    name = pointers.pointed(root).get(name, name)
    runs_here = storage.list_folders(root)
    path = storage.join(root, name, RECORD) if name in runs_here else None
    if path is None or not storage.exists(path):
        runs = [f for f in runs_here if storage.exists(storage.join(root, f, RECORD))]
        there = (
            f"there are {', '.join(runs)}"
            if runs
            else "it holds no finished run: `darkroom run demo` makes one"
        )
        raise UserError(f"there is no run {name!r} under {root}; {there}")
    try:
        return _Record.model_validate_json(storage.read_bytes(path)).at(root, name)
    except (IsADirectoryError, ValueError) as error:
        raise CorruptArtifact(
            f"{path} is no record of a run: remove it and run its recipe again, finished work is kept"
        ) from error


def finished(root: str) -> dict[str, dict[str, Any]]:
    """Run -> its record, of every run under `root` that has ended and whose record can be read."""
    found = {}
    for name in storage.list_folders(root):
        with suppress(UserError, CorruptArtifact):
            found[name] = find(root, name)
    return found


def _is_kept(plan: Plan) -> bool:
    """Whether the record of the plan's run is there and can be read."""
    with suppress(UserError, CorruptArtifact):
        return bool(find(plan.root, plan.run))
    return False


def named(root: str, name: str) -> str:
    """The folder of the run `name`, finished or not, or of the one that a pointer names; raises UserError when there is none."""
    name = pointers.pointed(root).get(name, name)
    if name in storage.list_folders(root) and storage.exists(storage.join(root, name, STARTED)):
        return name
    find(root, name)
    return name


@contextmanager
def keeping(root: str) -> Iterator[None]:
    """Holds the lease of those who forget runs or move a pointer under `root`; says whom it waits for."""

    def say(owner: Owner) -> None:
        console.log.warning("waiting for process %d on %s, which works on %s", owner.pid, owner.host, root)

    with lease(storage.join(root, KEEPING), waiting=say, patience=PATIENCE_SECONDS):
        yield


def spec_of(plan: Plan, stage: PlannedStage) -> StageSpec:
    """`stage` as anyone can run it."""
    config = stage.node.config
    if isinstance(config, ReportConfig):
        rows = [
            {
                "name": s.name,
                "status": "cached" if s.status == "cached" else "ran",
                "reason": s.reason,
                "fingerprint": s.fingerprint,
            }
            for s in plan.stages
        ]
        config = ReportConfig(
            run=plan.run,
            recipe=plan.recipe.name,
            plan=tuple(rows),
            gates=config.gates,
            sweeps=sweeps(storage.join(plan.root, plan.run)),
            config=plan.recipe.model_dump(mode="json"),
            prices=plan.recipe.prices,
        )
    return StageSpec(
        stage=stage.name,
        config=config.model_dump(mode="json"),
        inputs={role: pins.pinned(plan.root, ref) for role, ref in stage.inputs.items()},
        folder=stage.folder,
        fingerprint=stage.fingerprint,
        fanout=plan.recipe.fanout.of(stage.name),
        jobs=plan.recipe.jobs,
        version=stage.node.stage.version,
        run=plan.run,
    )


def sweeps(folder: str) -> tuple[Sweep, ...]:
    """What `darkroom evaluate --sweep` left beside the run's page."""
    names = [n for n in storage.list_files(folder) if n.startswith("sweep_") and n.endswith(".json")]
    return tuple(
        Sweep.model_validate_json(storage.read_bytes(storage.join(folder, n))) for n in sorted(names)
    )


def run_stages(
    plan: Plan, pending: Sequence[PlannedStage], *, address: str, verbose: bool
) -> dict[str, float]:
    """Runs `pending` in order on one cluster as one flow run named by `plan`; returns stage -> seconds."""
    is_local = storage.is_local(plan.root)
    home = storage.local_path(plan.root) / ".prefect" if is_local else Path.home() / ".cache/darkroom/prefect"
    embedded_prefect.configure(home, verbose=verbose)
    failures: list[Exception] = []
    with ExitStack() as stack:
        bars = stack.enter_context(console.Bars())
        stack.enter_context(logs.at(run=plan.run))
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # a flow that surrounds this has its own
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            stack.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        stack.callback(embedded_prefect.stop, home)
        embedded_prefect.start(home)  # which imports for as long as all that follows, up to the wait for it
        from flows.pipeline import FAILURES, WATCH, pipeline
        from stages import train

        stack.callback(WATCH.reset, WATCH.set(_watching(bars)))
        stack.callback(FAILURES.reset, FAILURES.set(failures))
        specs = [spec_of(plan, stage).model_dump(mode="json") for stage in pending]
        try:
            if not is_job_server(address):
                stack.enter_context(cluster(address, verbose=verbose))
                if not train.STAGES.keys().isdisjoint(spec["stage"] for spec in specs):
                    import_module("stages.trainer")  # Ray Train, while the server still starts
            embedded_prefect.wait()
            results = pipeline(plan.run, specs, address=address, verbose=verbose)
        except Exception as error:
            if error in failures or isinstance(error, DarkroomError):
                raise
            if failures:  # Prefect failed over noting a stage's failure, as it does on a full disk
                raise failures[0] from error
            console.log.debug("the flow failed", exc_info=error)
            raise StageFailed(_outside_stages(error)) from error
    return {result["name"]: result["seconds"] for result in results}


def _outside_stages(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"the run could not be carried out ({type(error).__name__}: {line}); run the same command again, with --verbose "
        "to see what Prefect and Ray say"
    )


def _watching(bars: console.Bars) -> Any:
    def watch(stage: str, done: float, total: float, unit: str, note: str) -> None:
        if done >= 0:
            bars.update(stage, done, total, unit, note)
        elif note == "start":
            bars.start(stage)
        else:
            bars.finish(stage, total)

    return watch


def _outcome(plan: Plan) -> dict[str, Any]:
    """The scores and the page, where the stages that make them are done."""
    folders = {stage.name: stage.folder for stage in plan.stages}
    outcome: dict[str, Any] = {"metrics": {}, "report": None}
    if "evaluate" in folders and storage.exists(path := storage.join(folders["evaluate"], "scores.json")):
        rows = json.loads(storage.read_bytes(path))["scores"]
        outcome["metrics"] = {row["name"]: {k: row[k] for k in Score.model_fields} for row in rows}
    if "report" in folders and storage.exists(storage.join(folders["report"], "report.html")):
        outcome["report"] = storage.join(plan.root, plan.run, "report.html")
    return outcome


def note_start(root: str, run: str, plans: Sequence[Plan]) -> None:
    """Notes that this process works on `plans` for the run, so that `gc` leaves what they name."""
    record = {
        "run": run,
        "folders": {f"{i} {stage.name}": stage.folder for i, p in enumerate(plans) for stage in p.stages},
        "external": {role: folder for plan in plans for role, folder in _external(plan).items()},
        "recipe": plans[0].recipe.model_dump(mode="json"),
        "owner": this_process().model_dump(mode="json"),
    }
    path = storage.join(root, run, STARTED)
    storage.write_bytes(path, (json.dumps(record, indent=1) + "\n").encode())


def forget_start(root: str, run: str) -> None:
    """Takes the note of `note_start` back."""
    storage.remove(storage.join(root, run, STARTED))


def _keep(plan: Plan, record: dict[str, Any], seconds: float) -> None:
    folder = storage.join(plan.root, plan.run)
    if record["report"]:
        page = next(stage.folder for stage in plan.stages if stage.name == "report")
        storage.write_bytes(record["report"], storage.read_bytes(storage.join(page, "report.html")))
    kept = {
        **record,
        "recipe": plan.recipe.model_dump(mode="json"),
        "folders": {stage.name: stage.folder for stage in plan.stages},
        "fingerprints": {stage.name: stage.fingerprint for stage in plan.stages},
        "external": _external(plan),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }
    storage.write_bytes(storage.join(folder, RECORD), (json.dumps(kept, indent=1) + "\n").encode())


def _external(plan: Plan) -> dict[str, str]:
    """Role -> where weights that no stage of the plan makes lie."""
    own = {stage.name for stage in plan.stages}
    used = ((role, ref) for stage in plan.stages for role, ref in stage.inputs.items())
    return {
        role: pins.pinned(plan.root, ref).folder
        for role, ref in used
        if ref.external or (role in ("clip", "vae") and ref.stage not in own)
    }
