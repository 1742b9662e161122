"""The lease: one builder per artifact at a time, and no dead one in the way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO

import pytest

from data import conditional, storage
from data import lease as leases
from data.errors import CorruptArtifact, LeaseHeld
from data.lease import EXPIRY_SECONDS, Owner, holder, lease

CHECKOUT = Path(__file__).parents[2]

HOLDER = """
import sys
from data.lease import lease
with lease(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""

WORKER = """
import os, sys, time
from data import lease as leases
leases.POLL_SECONDS = 0.01
marks = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for turn in range(6):
    with leases.lease(sys.argv[1]):
        os.write(marks, f"start {os.getpid()}\\n".encode())
        time.sleep(0.005)
        if sys.argv[3] == "dies" and turn == 2:
            os.kill(os.getpid(), 9)
        os.write(marks, f"stop {os.getpid()}\\n".encode())
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL_SECONDS", 0.05)


def _child(script: str, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(line, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["a disk", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An artifact's folder, not made yet, of each kind of store that has leases."""
    if request.param == "a disk":
        return str(tmp_path / "key")
    return f"{request.getfixturevalue('bucket')}/store/stage/key"


def _owner(folder: str) -> Owner | None:
    """Who the lease file names; None where there is none."""
    path = storage.join(folder, "_meta", "lease.json")
    return Owner.model_validate_json(storage.read_bytes(path)) if storage.exists(path) else None


def _holder(stack: ExitStack, folder: str) -> tuple[subprocess.Popen[str], IO[str]]:
    """A process that holds the lease of `folder` until its stdin is closed, and that stdin."""
    child = stack.enter_context(_child(HOLDER, folder))
    stack.callback(child.kill)
    assert child.stdin and child.stdout and child.stdout.readline() == "held\n"
    return child, child.stdin


def _written(folder: str, **change: object) -> None:
    """A lease file whose owner is this process, but for `change`."""
    owner = leases.this_process("earlier").model_copy(update=change)
    storage.write_bytes(storage.join(folder, "_meta", "lease.json"), owner.model_dump_json().encode())


def _seconds_to_enter(held: AbstractContextManager[None]) -> float:
    started = time.monotonic()
    with held:
        return time.monotonic() - started


def test_a_lease_is_held_inside_the_block_and_gone_after_it(folder: str) -> None:
    with lease(folder):
        owner = _owner(folder)
        assert owner and (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
        held = leases.holder(folder)
        assert held and held.token == owner.token
    assert _owner(folder) is leases.holder(folder) is None
    with pytest.raises(KeyError), lease(folder):
        raise KeyError
    assert _owner(folder) is None


def test_who_holds_a_lease_may_say_its_name(folder: str) -> None:
    for name in ("", "gc/agile fox"):
        with lease(folder, name=name):
            held = leases.holder(folder)
            assert held and held.name == name and held.token != name


def test_a_second_process_waits_for_a_live_owner_and_is_told_once(folder: str) -> None:
    told: list[Owner] = []
    with ExitStack() as stack:
        child, stdin = _holder(stack, folder)
        released: list[float] = []

        def release() -> None:
            released.append(time.monotonic())
            stdin.close()

        timer = threading.Timer(0.5, release)
        timer.start()
        with lease(folder, waiting=told.append):
            assert released and time.monotonic() > released[0]
        timer.join()
        assert [owner.pid for owner in told] == [child.pid]


def test_a_killed_owner_is_succeeded_at_once(folder: str) -> None:
    told: list[Owner] = []
    with ExitStack() as stack:
        child, _ = _holder(stack, folder)
        child.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, and not yet reaped
        assert _seconds_to_enter(lease(folder, waiting=told.append)) < 0.5
    assert told == []


def test_another_process_with_the_owners_number_is_not_the_owner(folder: str) -> None:
    _written(folder, born="1")
    assert _seconds_to_enter(lease(folder)) < 0.5


def test_an_owner_on_another_host_lives_as_long_as_its_heart_beats(folder: str) -> None:
    told: list[Owner] = []
    _written(folder, host="another", beat=time.time() - EXPIRY_SECONDS + 1.0)
    assert 0.5 < _seconds_to_enter(lease(folder, waiting=told.append)) < 5
    assert len(told) == 1
    _written(folder, host="another", beat=time.time() - EXPIRY_SECONDS - 1)
    assert leases.holder(folder) is None and _seconds_to_enter(lease(folder)) < 0.5


def test_a_host_that_cannot_tell_when_processes_began_goes_by_heartbeats(folder: str) -> None:
    _written(folder, born="", pid=2**22 + 1, beat=time.time() - EXPIRY_SECONDS - 1)
    assert _seconds_to_enter(lease(folder)) < 0.5


def test_an_unreadable_lease_holds_nobody_up(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "_meta", "lease.json"), b"{")
    assert _seconds_to_enter(lease(folder)) < 0.5


def test_a_folder_in_place_of_a_lease_is_told(tmp_path: Path) -> None:
    (tmp_path / "_meta" / "lease.json").mkdir(parents=True)
    with pytest.raises(CorruptArtifact, match="is a folder where a file belongs: remove it"):
        holder(str(tmp_path))


def test_the_heart_beats_and_an_owner_that_was_succeeded_takes_nothing_back(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.05)
    url = storage.join(folder, "_meta", "lease.json")
    with lease(folder):
        first = _owner(folder)
        time.sleep(0.3)
        second = _owner(folder)
        assert first and second and second.token == first.token and second.beat > first.beat
        successor = leases.this_process("successor").model_dump_json().encode()
        while not conditional.replace(url, successor, conditional.read(url).version):  # type: ignore[union-attr]
            pass  # the heart was quicker
        time.sleep(0.3)
    last = _owner(folder)
    assert last and last.token == "successor"


def test_an_artifact_that_its_owner_removed_has_no_lease_any_more(folder: str) -> None:
    with lease(folder):
        storage.remove_tree(folder)
    assert not storage.exists(folder)


def test_a_store_of_another_kind_has_no_lease() -> None:
    with lease("memory://store/key"), lease("memory://store/key"):
        assert not storage.exists("memory://store/key/_meta/lease.json")


@pytest.mark.slow
def test_eight_processes_some_of_which_are_killed_never_overlap(folder: str, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    fates = ["dies" if i % 2 else "lives" for i in range(8)]
    with ExitStack() as stack:
        children = [stack.enter_context(_child(WORKER, folder, marks, fate)) for fate in fates]
        for child in children:
            stack.callback(child.kill)
        codes = [child.wait(timeout=120) for child in children]
    assert codes == [-signal.SIGKILL if fate == "dies" else 0 for fate in fates]
    lines = [line.split() for line in marks.read_text().splitlines()]
    starts = [i for i, (mark, _) in enumerate(lines) if mark == "start"]
    assert len(starts) == 4 * 6 + 4 * 3
    for at, until in zip(starts, [*starts[1:], len(lines)], strict=True):
        assert lines[at + 1 : until] in ([["stop", lines[at][1]]], []), "another one started before the stop"
    dead = {str(child.pid) for child, fate in zip(children, fates, strict=True) if fate == "dies"}
    unstopped = [lines[at][1] for at in starts if ["stop", lines[at][1]] != [*lines, []][at + 1]]
    assert sorted(unstopped) == sorted(dead), "only who was killed inside the block did not stop"


def test_patience_ends_and_names_who_holds_the_lease(folder):
    with ExitStack() as stack:
        child, _ = _holder(stack, folder)
        with (
            pytest.raises(LeaseHeld, match=f"process {child.pid} on .* 0.1 s"),
            lease(folder, patience=0.1),
        ):
            raise AssertionError("the lease was given twice")
