"""Prefect without a server of its own: settings for one run on one machine, and no process left behind."""

from __future__ import annotations

import contextlib
import errno
import http
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from data.urls import refuse_credentials

SERVER = "prefect.server.api.server:create_app"
SERVER_SETTINGS = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""What Prefect gives a server that lives as long as one run."""
STARTING_SECONDS = 120.0
"""How long the server may take to answer."""
NOTES = "servers"
DATABASE_BYTES = 8_000_000
"""What a first run's database and its journal take."""
_OWN: list[subprocess.Popen] = []
"""The server that `start` started, until it is stopped."""


def configure(home: Path, *, verbose: bool) -> None:
    """Points Prefect at `home` and turns its telemetry off; must run before Prefect is imported.

    Settings that the user made in the environment stand. A server that an earlier, killed run left behind is ended.
    Within a flow run of a worker nothing is done: its settings are the worker's.
    Raises OSError (ENOSPC) where the database has no room: the server would try for minutes to start; UserError for a
    PREFECT_API_URL with credentials, which Prefect would log.
    """
    refuse_credentials("PREFECT_API_URL", os.environ.get("PREFECT_API_URL"))
    if is_within_flow_run():
        return
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "prefect.db").exists() and shutil.disk_usage(home).free < DATABASE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(home))
    defaults = {
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "INFO" if verbose else "CRITICAL",
        "PREFECT_LOGGING_SERVER_LEVEL": "WARNING" if verbose else "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "ERROR" if verbose else "CRITICAL",
        "PREFECT_CLI_COLORS": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    reap(home)


def is_within_flow_run() -> bool:
    """Whether a Prefect worker started this process to carry out a flow run."""
    return "PREFECT__FLOW_RUN_ID" in os.environ


def start(home: Path) -> None:
    """Starts the embedded server, unless the user's settings name another, and notes it for a later run to end.

    Returns at once: `wait` tells when it answers. Prefect's own way to start one imports all of the server here, too.
    Ctrl-C reaches every process of the terminal; the server is deaf to it, or the flow would wait for its answers for ever.
    """
    from prefect.settings import PREFECT_API_URL, get_current_settings

    if PREFECT_API_URL.value() or is_within_flow_run():
        return
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # held from here on, so that no other process takes it meanwhile
        # uvicorn forgets it for a socket that it is given, and every answer would take 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        options = ("--fd", str(listening.fileno()), "--log-level", "error", "--lifespan", "on")
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
        try:
            server = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "--factory", SERVER, *options],
                env=os.environ | settings | SERVER_SETTINGS,
                pass_fds=[listening.fileno()],
            )
            _OWN.append(server)
            note(home, server.pid)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        _use(f"http://127.0.0.1:{listening.getsockname()[1]}/api")


def wait() -> None:
    """Returns when the server that `start` started answers. Raises RuntimeError when it ends or takes two minutes."""
    deadline = time.monotonic() + STARTING_SECONDS
    for server in _OWN:
        while not _is_healthy(f"{os.environ['PREFECT_API_URL']}/health"):
            if (code := server.poll()) is not None:
                raise RuntimeError(f"Prefect's server ended with {code} as it started")
            if time.monotonic() > deadline:
                raise RuntimeError(f"Prefect's server did not answer within {STARTING_SECONDS:g} s")
            time.sleep(0.1)


def _is_healthy(url: str) -> bool:
    # A proxy of the environment does not know our loopback.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as answer:
            return answer.status == http.HTTPStatus.OK
    except OSError:
        return False


def _use(url: str | None) -> None:
    """Makes `url` Prefect's API in this process, or takes it back."""
    os.environ.pop("PREFECT_API_URL", None)
    if url:
        os.environ["PREFECT_API_URL"] = url
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def note(home: Path, pid: int) -> None:
    """Records that this process started the server `pid`."""
    (home / NOTES).mkdir(parents=True, exist_ok=True)
    (home / NOTES / str(pid)).write_text(str(os.getpid()))


def reap(home: Path) -> None:
    """Ends every server that an earlier run recorded under `home`, if that run is dead and its server still lives."""
    for noted in (home / NOTES).glob("[0-9]*"):
        pid = int(noted.name)
        with contextlib.suppress(OSError):
            is_ours = _is_ours(pid, home)
            if is_ours and str(_parent(pid)) == noted.read_text():
                continue  # its run goes on beside this one
            if is_ours:
                os.kill(pid, signal.SIGKILL)
            noted.unlink()


def stop(home: Path) -> None:
    """Flushes what Prefect still has to write and ends the embedded server; a flow run of a worker goes on writing."""
    if is_within_flow_run():
        return
    try:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=5)
    finally:
        while _OWN:
            server = _OWN.pop()
            server.terminate()
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            (home / NOTES / str(server.pid)).unlink(missing_ok=True)
            _use(None)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _is_ours(pid: int, home: Path) -> bool:
    """Whether `pid` is a Prefect server that keeps its database under `home`, or where the user's environment says."""
    kept = os.environ.get("PREFECT_HOME", str(home.resolve()))
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return SERVER.encode() in command and f"PREFECT_HOME={kept}".encode() in settings
