"""A real Prefect server and a real process worker on loopback, for tests that start runs as people do: through the API."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import deploying, serving

PATIENCE_SECONDS = 400.0


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((serving.HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def prefect_server(home: Path, settings: dict[str, str] | None = None) -> Iterator[str]:
    """A server for the length of the block, which everything in this process talks to; yields its API's URL."""
    with serving.server(home, free_port(), settings) as (url, _), talking_to(url):
        yield url


@contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Everything of Prefect in this process asks the server at `url`."""
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def entry(flow: str, name: str, run: dict[str, Any], *schedules: dict[str, Any]) -> dict[str, Any]:
    """A deployment of `flows.deployed.FLOW`, as a prefect.yaml has it."""
    return {
        "name": name,
        "entrypoint": f"flows.deployed.{flow}",
        "tags": ["darkroom"],
        "parameters": {"run": run},
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        "work_pool": {
            "name": "darkroom",
            "job_variables": {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "OMP_NUM_THREADS": "1"}},
        },
        "schedules": list(schedules),
    }


def deploy(folder: Path, *entries: dict[str, Any]) -> list[deploying.Applied]:
    """`darkroom deploy` of a file that holds `entries`."""
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump({"name": "tests", "pull": [], "deployments": list(entries)}))
    return deploying.deploy(file, {})


def start(deployment: str, run: dict[str, Any] | None = None) -> FlowRun:
    """A new run of `FLOW/NAME`, with `run` instead of the deployment's own."""
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        return client.create_flow_run_from_deployment(found.id, parameters={"run": run} if run else {})


def runs_of(deployment: str) -> list[FlowRun]:
    """Its runs that have a start time, oldest first."""
    with get_client(sync_client=True) as client:
        chosen = DeploymentFilter.model_validate(
            {"id": {"any_": [client.read_deployment_by_name(deployment).id]}}
        )
        return client.read_flow_runs(deployment_filter=chosen, limit=200, sort="EXPECTED_START_TIME_ASC")


def state(run: FlowRun, client: SyncPrefectClient) -> Any:
    """The present state of `run`."""
    return client.read_flow_run(run.id).state


def ended(run: FlowRun, seconds: float = PATIENCE_SECONDS) -> Any:
    """The final state of `run`, waited for."""
    with get_client(sync_client=True) as client:
        eventually(lambda: state(run, client).is_final(), seconds, lambda: str(state(run, client)))
        return state(run, client)


def artifacts(run: FlowRun) -> dict[str, Any]:
    """key -> data of the artifacts that `run` left."""
    chosen = {"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}}
    with get_client(sync_client=True) as client:
        rows = client.request("POST", "/artifacts/filter", json=chosen).json()
    return {row["key"]: row["data"] for row in rows}


def log(run: FlowRun) -> list[str]:
    """What `run` has said so far; lines arrive seconds after they were said."""
    chosen = {"logs": {"flow_run_id": {"any_": [str(run.id)]}}, "sort": "TIMESTAMP_ASC"}
    with get_client(sync_client=True) as client:
        return [row["message"] for row in client.request("POST", "/logs/filter", json=chosen).json()]


def eventually(
    holds: Callable[[], Any], seconds: float = PATIENCE_SECONDS, told: Callable[[], str] = lambda: ""
) -> Any:
    """What `holds` returns once that is true; AssertionError when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:.0f} s {told()}")


def process_of(worker: int) -> int:
    """The process that the worker `worker` started to carry out its one flow run."""
    found = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"prefect.engine" in _read(path) and _parent(path.parent) == worker
    ]
    (only,) = found
    return only


def _parent(process: Path) -> int:
    fields = _read(process / "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def processes_under(pid: int) -> list[int]:
    """The children of `pid`, and theirs."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").glob("[0-9]*")}
    found, newest = [], [pid]
    while newest:
        newest = [child for child, parent in parents.items() if parent in newest]
        found += newest
    return found
