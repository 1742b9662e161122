"""Which Ray cluster the stages run on: one started for this run on loopback, or an existing one that is asserted."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data.errors import UserError
from stages.autoscaler import NodeGroup, node_groups

_HIDES_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    _HIDES_GPUS: "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",
}
"""An autoscaler may take minutes to start nodes. Ray's workers would run at niceness 15: beside anything else that wants a
CPU, training all but stops."""
_ALONE = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""Of a cluster of this machine alone: nobody gives it notice, and Ray, told that it is on no cluster of machines, listens on
loopback only."""

ANSWER_SECONDS = 20.0
"""How long a head may take to answer its first question."""

ENDING_SECONDS = 5.0
"""How long the processes of an own cluster get to end by themselves."""

_RESTING: dict[str, list[Any]] = {}


@contextmanager
def cluster(address: str, *, verbose: bool = False) -> Iterator[None]:
    """Ray, connected for the length of the block.

    `local` starts a cluster of this machine's CPUs, without dashboard, on loopback, and stops it afterwards; `auto` and
    `HOST:PORT` attach to a running one. Raises UserError when there is none: Ray itself would quietly start a local one.
    """
    prepare_environment(address)
    import ray

    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    options = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if address == "local":
        _start(options)
    else:
        _attach(address, options)
    _keep_handler(on_sigterm)
    try:
        with interrupts_kept():
            yield
    finally:
        _shut_down()


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Within the block, what a signal's handler raises stays what it is: where it comes in the midst of Ray's waiting, Ray gives
    a SystemError in its place, which nobody takes for a request to stop."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None or isinstance(error.__cause__, Exception):
            raise
        raise error.__cause__ from None


def _shut_down() -> None:
    """Leaves the cluster; ends one of our own with every process of it, since a worker now and then hangs as it exits."""
    import ray

    own = ray._private.worker._global_node if is_own() else None
    raylets = [info.process.pid for info in own.all_processes.get("raylet", [])] if own else []
    _RESTING.clear()
    ray.shutdown()
    deadline = time.monotonic() + ENDING_SECONDS
    while any(map(_workers_of, raylets)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in (pid for raylet in raylets for pid in _workers_of(raylet)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _workers_of(raylet: int) -> list[int]:
    """The pids of the processes that the raylet of this pid started, and of theirs."""
    mark, found = f"RAY_RAYLET_PID={raylet}".encode(), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found


def _start(options: dict[str, Any]) -> None:
    """Starts a cluster of this machine's CPUs; once more where a busy machine exceeds the half minute that Ray gives it."""
    import ray

    for attempt in (1, 2):
        try:
            with _importable():
                ray.init(address="local", include_dashboard=False, num_cpus=os.cpu_count(), **options)
            return
        except Exception as error:  # Ray has no class of its own for it
            if attempt == 2 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


def prepare_environment(address: str) -> None:
    """What Ray must find in the environment when it is imported.

    Settings of the user stand. A cluster of this run alone has no token; towards another one, a token that is there is used.
    """
    for name, value in (_ENVIRONMENT | (_ALONE if address == "local" else {})).items():
        os.environ.setdefault(name, value)
    has_token = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token and address != "local" else "disabled")


def ray_command() -> str:
    """How a person calls Ray's own command here: it goes without the token, unless it is told to take it."""
    return "RAY_AUTH_MODE=token ray" if os.environ.get("RAY_AUTH_MODE") == "token" else "ray"


def answers(address: str) -> bool:
    """Whether something listens where `address` leads; a cluster that is started for a run always does."""
    if address == "local":
        return True
    if address.startswith(("http://", "https://")):
        url = urlsplit(address)
        try:
            return _answers(f"{url.hostname}:{url.port or (443 if url.scheme == 'https' else 80)}")
        except ValueError:  # a port that is none
            return False
    head = _running_head() if address == "auto" else address
    return head is not None and _answers(head)


def is_own() -> bool:
    """Whether the connected cluster is one that this process started, and that ends with it."""
    import ray

    return ray._private.worker._global_node is not None and ray._private.worker._global_node.is_head()


def resting() -> list[Any]:
    """Actors of the connected cluster between two stages, free to be given the work of the next. None on another's cluster.

    They have imported what a stage imports, and end with the cluster.
    """
    import ray

    return _RESTING.setdefault(ray._private.worker._global_node.session_name, []) if is_own() else []


def num_cpus() -> int:
    """CPUs that the connected cluster has, or may start."""
    return max(1, _most("CPU", sum(group.nodes * group.cpus for group in _startable())))


def num_gpus() -> int:
    """GPUs that the connected cluster has, or may start."""
    return _most("GPU", sum(group.nodes * group.gpus for group in _startable()))


def cpus_of_each(workers: int) -> int:
    """CPUs that each of `workers` may have for itself, all of one node; 1 where there are not even as many CPUs."""
    here = [(1, int(node.get("CPU", 0))) for node in _nodes()]
    later = [(group.nodes, group.cpus) for group in _startable()]
    return max(1, _share(here, workers), _share(later, workers))


def cpus_beside_a_gpu() -> int:
    """CPUs that every GPU of the nodes that are there, or may be started, may have for itself; 1 where there is no GPU."""
    here = [(int(node.get("CPU", 1)), node["GPU"]) for node in _nodes() if node.get("GPU")]
    later = [(group.cpus, group.gpus) for group in _startable() if group.gpus]
    return max(1, min((int(cpus // gpus) for cpus, gpus in here + later), default=1))


def _share(nodes: list[tuple[int, int]], workers: int) -> int:
    """The most CPUs that each of `workers` can have on (how many, CPUs of each) `nodes`; 0 where they do not fit."""
    largest = max((cpus for _, cpus in nodes), default=0)
    fits = (each for each in range(largest, 0, -1) if sum(n * (cpus // each) for n, cpus in nodes) >= workers)
    return next(fits, 0)


def _most(resource: str, startable: int) -> int:
    """What there is of `resource` now, or the autoscaler may bring it to."""
    import ray

    return int(max(ray.cluster_resources().get(resource, 0), startable))


def _startable() -> tuple[NodeGroup, ...]:
    return () if is_own() else node_groups()


def _nodes() -> list[dict[str, float]]:
    """The resources of each node that is there."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _attach(address: str, options: dict) -> None:
    import ray

    if address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: this is carried out here, on a cluster at auto or HOST:PORT of a head"
        )
    head = _running_head() if address == "auto" else address
    nothing = f"--address {address}: no Ray cluster answers there; start one with `ray start --head`, or use --address local"
    if head is None or not _answers(head):  # ray.init would try for minutes, or start a cluster of its own
        raise UserError(nothing)
    _ask_head(address, head, nothing)
    try:
        ray.init(address=head, runtime_env=_runtime(), **options)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"--address {address}: the Ray cluster at {head} refuses: {str(error).splitlines()[0]}"
        ) from error
    attached = ray.get_runtime_context().gcs_address
    if attached.rpartition(":")[2] != head.rpartition(":")[2]:
        ray.shutdown()
        raise UserError(
            f"--address {address}: asked for the cluster at {head}, attached to one at {attached}"
        )


def _ask_head(address: str, head: str, nothing: str) -> None:
    """Raises UserError where no head of a cluster answers, or one that does not take our token: ray.init asks for minutes."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import AuthenticationError

    try:
        with init_grpc_channel(head, [("grpc.enable_http_proxy", 0)]) as channel:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=ANSWER_SECONDS)
    except AuthenticationError as error:
        raise UserError(unauthorised(address, was_given=False)) from error
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.UNAUTHENTICATED:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(nothing) from error
        has_token = os.environ.get("RAY_AUTH_MODE") == "token"
        raise UserError(unauthorised(address, was_given=has_token)) from error


def unauthorised(address: str, *, was_given: bool) -> str:
    """What to do where the cluster at `address` wants another token than it was given."""
    if was_given:
        return f"--address {address}: the cluster does not take this token: set RAY_AUTH_TOKEN to the cluster's own"
    return f"--address {address}: the cluster wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"


def _keep_handler(handler: Any) -> None:
    """Ray's own handler of SIGTERM exits at once; whoever set one before wants to be told."""
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _running_head() -> str | None:
    """What `auto` means to Ray: RAY_ADDRESS, or the cluster that `ray start` noted on this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return note.read_text().strip() if note.is_file() else None


def _answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _importable() -> Iterator[None]:
    """Within the block, an environment in which workers import what this process imports.

    Ray's own `runtime_env` would do, but the workers that Ray starts ahead have none, and would be replaced one by one.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _import_path()
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _import_path() -> str:
    # A packaged working directory would hide the checkout behind a copy.
    checkout = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH")]))


def _runtime() -> dict:
    # Of another one's cluster, workers have none of our environment; an actor without a GPU would see all of its node's.
    return {"env_vars": {"PYTHONPATH": _import_path(), _HIDES_GPUS: "1"}}
