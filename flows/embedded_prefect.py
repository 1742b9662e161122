"""Prefect without a server of its own: settings for one run on one machine, and no process left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from pathlib import Path

from data.urls import refuse_credentials

SERVER = "prefect.server.api.server:create_app"
NOTES = "servers"
DATABASE_BYTES = 8_000_000
"""What a first run's database and its journal take."""


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
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
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
    """Starts the embedded server, unless the user's environment names another, and notes it for a later run to end.

    Ctrl-C reaches every process of the terminal; the server is deaf to it, or the flow would wait for its answers for ever.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() or is_within_flow_run():
        return
    server = SubprocessASGIServer()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child inherits it
    try:
        server.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    assert server.server_process is not None
    note(home, server.server_process.pid)


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
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)
    for server in list(SubprocessASGIServer._instances.values()):
        server.stop()
    for noted in (home / NOTES).glob("[0-9]*"):
        if noted.read_text() == str(os.getpid()):
            noted.unlink(missing_ok=True)


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
