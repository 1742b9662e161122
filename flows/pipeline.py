"""The flow: each stage one Prefect task that passes URIs of snapshots, never arrays. Done means that a snapshot exists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from stages.catalogue import check_spec, run_spec
from stages.cluster import cluster
from stages.contract import StageSpec
from stages.jobs import connect, is_job_server, run_as_job
from stages.shared_root import check_shared

Watch = Callable[[str, float, float, str, str], None]
"""(stage, done, total, unit, note)."""
WATCH: ContextVar[Watch] = ContextVar("darkroom_watch", default=lambda *_: None)
"""Where progress of the flow's stages goes; no flow parameter, since a scheduled run has no terminal."""

FAILURES: ContextVar[list[Exception]] = ContextVar("darkroom_failures")
"""What stages raised, in order; Prefect's own troubles may hide it from the flow's caller."""


@task(name="stage", task_run_name="{stage}", cache_policy=NO_CACHE, persist_result=False)
def run_stage(
    stage: str,
    spec: dict[str, Any],
    address: str = "local",
    later: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Runs one stage to its snapshot, on the connected cluster or as a job; returns where it lies and how long it took."""
    watch = WATCH.get()
    watch(stage, -1, 0, "", "start")

    def progress(done: float, total: float, unit: str, note: str = "") -> None:
        watch(stage, done, total, unit, note)

    one, *others = map(StageSpec.model_validate, (spec, *later))
    try:
        if is_job_server(address):
            say = get_run_logger().info
            snapshot = run_as_job(one, address, progress=progress, say=say, later=others)
        else:
            snapshot = run_spec(one, progress)
    except Exception as error:
        FAILURES.get([]).append(error)
        raise
    watch(stage, -1, snapshot.seconds, "", "finish")
    return {"name": stage, "uri": snapshot.folder, "seconds": snapshot.seconds}


@flow(name="darkroom", flow_run_name="{run}", persist_result=False, validate_parameters=False)
def pipeline(
    run: str,  # noqa: ARG001  names the flow run
    specs: list[dict[str, Any]],
    address: str = "local",
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Runs the pending stages `specs` in order on the cluster at `address`, or as jobs of the job server there."""
    results = []
    with _reached(address, specs, verbose):
        for i, spec in enumerate(specs):
            later = specs[1:] if i == 0 else []  # the first job refuses what the cluster cannot run later
            results.append(run_stage(spec["stage"], spec, address, later))
    return results


@contextmanager
def _reached(address: str, specs: list[dict[str, Any]], verbose: bool) -> Iterator[None]:
    """The cluster at `address`, connected or answering, and able to run all of `specs`."""
    if is_job_server(address):
        connect(address)
        yield
        return
    with cluster(address, verbose=verbose):
        for spec in specs:
            check_spec(StageSpec.model_validate(spec))
        check_shared(specs[0]["folder"])
        yield
