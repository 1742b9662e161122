"""One machine that keeps a schedule: a Prefect server on SQLite, bound to loopback, and a process worker, from start to end."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import StageFailed, UserError
from data.lease import Owner, lease

HOST = "127.0.0.1"
START_SECONDS = 180.0
END_SECONDS = 90.0
"""How long runs get to end, and then a worker, before they are killed."""
IDLE_END_SECONDS = 5.0
"""How long a worker or a server that runs nothing gets, before it is asked again."""
LAST_SECONDS = 10.0
"""How long it gets after it was asked for the last time."""


def serve(
    home: Path, port: int, deploy: Callable[[], None], ready: Callable[[str], None], pool: str = "darkroom"
) -> None:
    """Runs a server with its database under `home` and a worker of `pool`, until Ctrl-C or SIGTERM; ends both.

    `deploy` is called when the server answers, with PREFECT_API_URL set; `ready` when the worker has been started. What an
    earlier one that was killed left running under `home` is ended first; flow runs ask the same port and go on. Raises
    UserError where that is taken or another one serves from `home`, StageFailed where one of the two ends by itself.
    """
    _make_home(home)
    with _signalled() as stopped, _only(home), server(home, port) as (url, of_server):
        os.environ["PREFECT_API_URL"] = url
        deploy()
        with worker(home, url, pool) as of_worker:
            ready(url)
            while not stopped.wait(1.0):
                for name, process in (("server", of_server), ("worker", of_worker)):
                    if process.poll() is not None:
                        raise StageFailed(
                            f"the Prefect {name} ended with exit code {process.returncode}; {home / name}.log says why"
                        )
            _cancel_runs(pool)


def _make_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--home {home} is no folder and cannot become one: give another") from error


@contextmanager
def _only(home: Path) -> Iterator[None]:
    """The only `serve` of `home`: two servers would wait for each other over its SQLite file, and start every run twice."""

    def refuse(owner: Owner) -> None:
        raise UserError(
            f"process {owner.pid} on {owner.host} serves from {home} already: end it, or give another --home and --port"
        )

    with lease(str(home), waiting=refuse):
        for name in ("server", "worker"):
            _end_left(home, name)
        yield


def _end_left(home: Path, name: str) -> None:
    """Ends the server or worker of a `serve` that was killed. Not what that worker had started: a run goes on by itself."""
    note = home / f"{name}.pid"
    with suppress(OSError, ValueError):
        pid = int(note.read_text())
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if f"PREFECT_HOME={home}".encode() in environment and {b"prefect", name.encode()} <= {*command}:
            ending = [pid, *_children(pid)] if name == "server" else [pid]
            for each in ending:
                os.kill(each, signal.SIGKILL)
            deadline = time.monotonic() + LAST_SECONDS
            while any(map(_lives, ending)) and time.monotonic() < deadline:  # until its port is free
                time.sleep(0.05)
    note.unlink(missing_ok=True)


@contextmanager
def server(
    home: Path, port: int, settings: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Prefect server on loopback, for the length of the block: (its API's URL, its process)."""
    _refuse_taken(port)
    line = ["server", "start", "--host", HOST, "--port", str(port)]
    with _running("server", line, home, settings or {}, patience=20.0) as process:
        url = f"http://{HOST}:{port}/api"
        _await(url, process, home / "server.log")
        yield url, process


@contextmanager
def worker(home: Path, url: str, pool: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process worker of `pool`, for the length of the block."""
    line = ["worker", "start", "--pool", pool, "--type", "process"]
    with _running("worker", line, home, {"PREFECT_API_URL": url}, patience=END_SECONDS) as process:
        yield process


@contextmanager
def _running(
    name: str, arguments: list[str], home: Path, settings: Mapping[str, str], *, patience: float
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m prefect *arguments` beside us, out of reach of our terminal's Ctrl-C, which would reach all at once."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        **settings,
    }
    with (home / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    note = home / f"{name}.pid"
    try:
        note.write_text(str(process.pid))
        yield process
    finally:
        _end(process, patience)
        note.unlink(missing_ok=True)


def _cancel_runs(pool: str) -> None:
    """Asks the worker to end what it runs, and waits for it: a worker that is itself asked to end kills its runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Cancelling

    unfinished = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING"]}}})
    here = WorkPoolFilter.model_validate({"name": {"any_": [pool]}})
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=unfinished, work_pool_filter=here, limit=200, sort="START_TIME_DESC"
        )
        for run in found:
            client.set_flow_run_state(run.id, Cancelling())
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            if all((state := client.read_flow_run(run.id).state) and state.is_final() for run in found):
                return
            time.sleep(0.5)


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Asks, again and again where it runs nothing, a last time after `patience`, and then kills the whole session.

    A worker that has lost its server, or has run something before, may not hear the first request.
    """
    deadline, asked = time.monotonic() + patience, -math.inf
    while process.poll() is None and (now := time.monotonic()) < deadline:
        if asked < 0 or (now - asked > IDLE_END_SECONDS and not _children(process.pid)):
            process.terminate()
            asked = now
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it left behind, such as a run that heard nothing
    process.wait()


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [
            int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()
        ]
    return []


def _lives(pid: int) -> bool:
    """Whether any thread of the process may still hold its ports; a process that nobody waited for is one entry of /proc."""
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" or len([*(process / "task").iterdir()]) > 1
    return False


@contextmanager
def _signalled() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM; a second one does not cut short the ending of what runs."""
    stopped = threading.Event()
    held = {s: signal.signal(s, lambda *_: stopped.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for each, handler in held.items():
            signal.signal(each, handler)


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port {port} is taken on {HOST}: end what listens there, or give another port"
            ) from error


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StageFailed(f"the Prefect server ended with exit code {process.returncode}; {log} says why")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise StageFailed(
        f"the Prefect server did not answer within {START_SECONDS:.0f} s; {log} says what it did"
    )
