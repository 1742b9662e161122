"""Processes that a test starts and kills: in groups of their own, watched for a sign, with the Ray workers below them.

Not in conftest.py: pytest loads that under a name of its own, and who imports it by name has a second one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_lines import CHECKOUT, environment

DEADLINE = 200.0
"""Seconds until a run that has begun shows what a test waits for."""


def launch(line: list[str], **variables: str) -> subprocess.Popen[str]:
    """The command `line` in a process group of its own, its output kept for `finish`."""
    return subprocess.Popen(
        line,
        env=environment() | variables,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    """Waits for a run that has to end well, and returns what it said on stderr."""
    try:
        _, said = run.communicate(timeout=250)
    finally:
        kill(run)
    assert run.returncode == 0, said[-3000:]
    return said


def kill(run: subprocess.Popen[str]) -> None:
    """SIGKILL of all that the run started, where any of it lives."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def wait_for(sign: Callable[[], Any], run: subprocess.Popen[str]) -> Any:
    """What `sign` returns once that is true; the run must not end before, nor wait for ever."""
    deadline = time.monotonic() + DEADLINE
    while not (seen := sign()):
        if run.poll() is not None:
            pytest.fail(f"the run ended too early: {run.communicate()}")
        if time.monotonic() > deadline:
            kill(run)
            pytest.fail("the run made no progress")
        time.sleep(0.005)
    return seen


def members(group: int) -> list[int]:
    """The pids of a process group's living processes."""
    return [pid for pid, fields in _processes() if int(fields[2]) == group and fields[0] != "Z"]


def stopped_at_work(ancestor: int) -> int | None:
    """The pid of a worker below `ancestor` that computes a shard; it is stopped there. None while there is no such worker."""
    for worker in workers_below(ancestor):
        os.kill(worker, signal.SIGSTOP)
        if _title(worker).startswith(b"ray::_Worker.run"):
            return worker
        os.kill(worker, signal.SIGCONT)
    return None


def workers_below(ancestor: int) -> list[int]:
    """Ray's processes that run shards, among the children of `ancestor` and theirs."""
    parents = {pid: int(fields[1]) for pid, fields in _processes()}
    below, level = [], [ancestor]
    while level := [pid for pid, parent in parents.items() if parent in level]:
        below += level
    return [pid for pid in below if _title(pid).startswith(b"ray::_Worker")]


def open_files(pid: int) -> Iterator[str]:
    """The paths of the files that a process has open."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it was just closed
            yield str(descriptor.readlink())


def _processes() -> Iterator[tuple[int, list[str]]]:
    """pid -> the fields of its `stat` from the state on: state, parent, group, …"""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            yield int(entry.name), (entry / "stat").read_text().rsplit(")", 1)[1].split()


def _title(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
