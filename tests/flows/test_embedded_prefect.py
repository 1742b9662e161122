"""A Prefect server that a killed run left behind is ended by the next one; nothing else ever is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows import embedded_prefect

SLEEPER = "import time; time.sleep(300)"
PARENT = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}, *sys.argv[1:]]).pid, flush=True); import time; time.sleep(300)"
Start = Callable[..., tuple[subprocess.Popen, int]]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    return tmp_path / ".prefect"


@pytest.fixture
def start(home) -> Iterator[Start]:
    """(command line's end, PREFECT_HOME) -> (a run's process, the pid of the server that it started)."""
    started: list[tuple[subprocess.Popen, int]] = []

    def begin(name: str = embedded_prefect.SERVER, kept: Path = home) -> tuple[subprocess.Popen, int]:
        line = [sys.executable, "-c", PARENT, name]
        run = subprocess.Popen(
            line, stdout=subprocess.PIPE, text=True, env=os.environ | {"PREFECT_HOME": str(kept)}
        )
        assert run.stdout is not None
        started.append((run, int(run.stdout.readline())))
        loaded(started[-1][1])
        return started[-1]

    yield begin
    for run, server in started:
        run.kill()
        run.wait()
        run.stdout.close()
        if is_alive(server) and Path(f"/proc/{server}/cmdline").read_bytes().find(SLEEPER.encode()) >= 0:
            os.kill(server, signal.SIGKILL)


def loaded(pid: int) -> None:
    """Waits until `pid` has the environment of its program: one that is still being loaded has none."""
    deadline = time.monotonic() + 10
    while not Path(f"/proc/{pid}/environ").read_bytes():
        assert time.monotonic() < deadline, f"process {pid} was not loaded within 10 s"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def noted(home: Path, run: subprocess.Popen, server: int) -> Path:
    (home / embedded_prefect.NOTES).mkdir(parents=True, exist_ok=True)
    note = home / embedded_prefect.NOTES / str(server)
    note.write_text(str(run.pid))
    return note


def killed(run: subprocess.Popen) -> None:
    run.kill()
    run.wait()


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_server_of_a_killed_run_is_ended(home, start):
    run, server = start()
    note = noted(home, run, server)
    killed(run)
    assert is_alive(server)
    embedded_prefect.reap(home)
    assert ended(server) and not note.exists()


def test_the_servers_of_all_killed_runs_are_ended(home, start):
    both = [start(), start()]
    for run, server in both:
        noted(home, run, server)
        killed(run)
    embedded_prefect.reap(home)
    assert all(ended(server) for _, server in both)


def test_the_server_of_a_run_that_goes_on_is_left_alone(home, start):
    run, server = start()
    note = noted(home, run, server)
    embedded_prefect.reap(home)
    assert is_alive(server) and note.exists()


def test_a_process_that_is_no_prefect_server_is_left_alone(home, start):
    run, other = start("an-editor")
    note = noted(home, run, other)
    killed(run)
    embedded_prefect.reap(home)
    assert is_alive(other) and not note.exists()


def test_another_projects_server_is_left_alone(home, start, tmp_path):
    run, other = start(kept=tmp_path / "another")
    noted(home, run, other)
    killed(run)
    embedded_prefect.reap(home)
    assert is_alive(other)


def test_a_server_that_nobody_recorded_is_left_alone(home, start):
    run, server = start()
    killed(run)
    home.mkdir(parents=True)
    embedded_prefect.reap(home)
    assert is_alive(server)


def test_a_note_of_a_process_long_gone_is_dropped(home):
    (home / embedded_prefect.NOTES).mkdir(parents=True)
    note = home / embedded_prefect.NOTES / "4194399"
    note.write_text("4194398")
    embedded_prefect.reap(home)
    assert not note.exists()


def test_prefect_gets_a_home_of_its_own_and_no_telemetry(home, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ["PREFECT_LOGGING_LEVEL"] = "DEBUG"
    embedded_prefect.configure(home, verbose=False)
    assert home.is_dir() and os.environ["PREFECT_HOME"] == str(home)
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and os.environ["DO_NOT_TRACK"] == "1"
    assert os.environ["PREFECT_LOGGING_LEVEL"] == "DEBUG", "what the user set stands"


def test_a_flow_run_of_a_worker_keeps_the_workers_settings(home, monkeypatch):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    monkeypatch.setattr(os, "environ", ours | {"PREFECT__FLOW_RUN_ID": "of a worker"})
    embedded_prefect.configure(home, verbose=False)
    assert not home.exists() and "PREFECT_LOGGING_SERVER_LEVEL" not in os.environ
