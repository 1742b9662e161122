"""Prefect without a server of its own: settings for one run on one machine, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

SERVER = "prefect.server.api.server:create_app"


def configure(home: Path, *, verbose: bool) -> None:
    """Points Prefect at `home` and turns its telemetry off; must run before Prefect is imported.

    Settings that the user made in the environment stand. A server that an earlier, killed run left behind is ended.
    """
    home.mkdir(parents=True, exist_ok=True)
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


def record(home: Path) -> None:
    """Notes the embedded server that this process started, so that a later run can end it if this one is killed."""
    for pid in _children(os.getpid()):
        if SERVER in _command(pid):
            (home / "embedded.pid").write_text(str(pid))


def reap(home: Path) -> None:
    """Ends the server recorded by an earlier run, if that run is dead and its server still lives."""
    note = home / "embedded.pid"
    try:
        pid = int(note.read_text())
    except (OSError, ValueError):
        return
    if SERVER in _command(pid) and _parent(pid) == 1:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if SERVER not in _command(pid) or _parent(pid) == 1:
        note.unlink(missing_ok=True)


def stop(home: Path) -> None:
    """Flushes what Prefect still has to write and ends the embedded server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)
    for server in list(SubprocessASGIServer._instances.values()):
        server.stop()
    (home / "embedded.pid").unlink(missing_ok=True)


def _children(pid: int) -> list[int]:
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(int(p.name)) == pid]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
