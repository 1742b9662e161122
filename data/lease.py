"""One builder per artifact: a lease file with owner and heartbeat. Dead owners are recognised and succeeded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data import storage
from data.config import Config
from data.errors import LeaseHeld

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
POLL_SECONDS = 1.0


class Owner(Config):
    """Who holds a lease."""

    token: str
    host: str
    pid: int
    born: str
    """Start time of the process, so that a reused pid is not taken for its owner."""
    beat: float
    """Unix time of the last heartbeat."""


@contextmanager
def lease(
    folder: str, *, waiting: Callable[[Owner], None] = lambda _: None, patience: float = math.inf
) -> Iterator[None]:
    """Holds the only lease on the artifact `folder` for the length of the block; waits while another live owner has it.

    `waiting` is called once with the present owner before the wait; LeaseHeld is raised after `patience` seconds of it. An owner whose process has ended on this machine, or
    whose heartbeat is older than a minute, is succeeded. Object stores have no lease yet: the block runs at once.
    """
    if not storage.is_local(folder):
        yield
        return
    path = storage.local_path(folder) / "_meta" / "lease.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    _acquire(path, token, waiting, patience)
    stopped = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, token, stopped), daemon=True, name="darkroom-lease")
    beating.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join()
        with contextlib.suppress(FileNotFoundError), _alone(path):  # its holder may have removed the artifact
            if (owner := _read(path)) and owner.token == token:
                path.unlink(missing_ok=True)


def holder(folder: str) -> Owner | None:
    """Who holds the lease on the artifact `folder` and lives; None where nobody does, and in an object store."""
    if not storage.is_local(folder):
        return None
    owner = _read(storage.local_path(folder) / "_meta" / "lease.json")
    return owner if owner and is_alive(owner) else None


def this_process(token: str = "") -> Owner:
    """This process as an owner, its heart beating now."""
    pid = os.getpid()
    return Owner(token=token, host=socket.gethostname(), pid=pid, born=_born(pid), beat=time.time())


def is_alive(owner: Owner) -> bool:
    """Whether the process lives, of this machine; whether its heart beat within the last minute, of another."""
    if owner.host == socket.gethostname() and owner.born:
        return _born(owner.pid) == owner.born
    return time.time() - owner.beat <= EXPIRY_SECONDS


def _acquire(path: Path, token: str, waiting: Callable[[Owner], None], patience: float) -> None:
    told, deadline = False, time.monotonic() + patience
    while owner := _take(path, token):
        if not told:
            waiting(owner)
            told = True
        if time.monotonic() > deadline:
            raise LeaseHeld(
                f"process {owner.pid} on {owner.host} has been building {path.parent.parent} for all of the {patience:g} s "
                "that this run waits (fanout.lease_seconds): wait for it, or end it, and run the same command again"
            )
        time.sleep(POLL_SECONDS)


def _take(path: Path, token: str) -> Owner | None:
    """Writes our lease where there is none of a live owner; else returns that owner."""
    with _alone(path):
        owner = _read(path)
        if owner is not None and is_alive(owner):
            return owner
        storage.write_bytes(str(path), this_process(token).model_dump_json().encode())
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time reads a lease and changes it; the system ends the turn of a process that is killed."""
    with path.with_suffix(".lock").open("wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


def _beat(path: Path, token: str, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        # a disk that is full now may have room at the next beat
        with contextlib.suppress(OSError), _alone(path):
            owner = _read(path)
            if owner is None or owner.token != token:
                return
            storage.write_bytes(str(path), this_process(token).model_dump_json().encode())


def _read(path: Path) -> Owner | None:
    try:
        return Owner.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _born(pid: int) -> str:
    """The process's start time in clock ticks since boot (field 22 of /proc/PID/stat).

    Empty when it has ended, and on a system without /proc, where only heartbeats tell.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
