"""One builder per artifact: a lease file with owner and heartbeat. Dead owners are recognised and succeeded."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data import conditional, storage
from data.config import Config
from data.errors import LeaseHeld

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
POLL_SECONDS = 1.0
FILE = "lease.json"


class Owner(Config):
    """Who holds a lease."""

    token: str
    """Of one holding; begins with the holder's name, where it gave one."""
    host: str
    pid: int
    born: str
    """Start time of the process, so that a reused pid is not taken for its owner."""
    beat: float
    """Unix time of the last heartbeat."""

    @property
    def name(self) -> str:
        """What the holder is called; empty where it did not say."""
        return self.token.rpartition(" ")[0]


@contextmanager
def lease(
    folder: str,
    *,
    name: str = "",
    waiting: Callable[[Owner], None] = lambda _: None,
    patience: float = math.inf,
    setting: str = "",
) -> Iterator[None]:
    """Holds the only lease on the artifact `folder` for the length of the block; waits while another live owner has it.

    `waiting` is called once with the present owner before the wait; LeaseHeld is raised after `patience` seconds of it, and
    names the `setting` that holds them. Others are told `name`. An owner whose process has ended on this machine, or whose
    heartbeat is older than a minute, is succeeded: machines that share a store agree on the time to well within that. On a
    disk and in S3; stores of other kinds have no lease, the block runs at once.
    """
    if not conditional.is_supported(folder):
        yield
        return
    url, token = _place(folder), f"{name} {secrets.token_hex(8)}".lstrip()
    _acquire(url, token, waiting, patience, f" ({setting})" if setting else "")
    stopped = threading.Event()
    beating = threading.Thread(target=_beat, args=(url, token, stopped), daemon=True, name="darkroom-lease")
    beating.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join()
        with contextlib.suppress(Exception):  # a lease that cannot be given back runs out by itself
            owner, version = _read(url)
            if owner and owner.token == token:
                conditional.remove(url, version)


def holder(folder: str) -> Owner | None:
    """Who holds the lease on the artifact `folder` and lives; None where nobody does, and in a store that has no leases."""
    if not conditional.is_supported(folder):
        return None
    owner, _ = _read(_place(folder))
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


def _place(folder: str) -> str:
    return storage.join(folder, "_meta", FILE)


def _acquire(url: str, token: str, waiting: Callable[[Owner], None], patience: float, setting: str) -> None:
    told, deadline = False, time.monotonic() + patience
    while owner := _take(url, token):
        if not told:
            waiting(owner)
            told = True
        if time.monotonic() > deadline:
            raise LeaseHeld(
                f"process {owner.pid} on {owner.host} has been at work on {url.rsplit('/', 2)[0]} for all of the {patience:g} s "
                f"that this run waits{setting}: wait for it, or end it, and run the same command again"
            )
        time.sleep(POLL_SECONDS)


def _take(url: str, token: str) -> Owner | None:
    """Writes our lease where there is none of a live owner; else returns that owner."""
    while True:
        owner, version = _read(url)
        if owner and owner.token == token:
            return None  # written before, by a request whose answer was lost
        if owner and is_alive(owner):
            return owner
        mine = _payload(token)
        if conditional.replace(url, mine, version) if version else conditional.create(url, mine):
            return None


def _beat(url: str, token: str, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        # a disk that is full now may have room at the next beat, a store that is away may be back
        with contextlib.suppress(Exception):
            owner, version = _read(url)
            if owner is None or owner.token != token:
                return
            conditional.replace(url, _payload(token), version)


def _payload(token: str) -> bytes:
    return this_process(token).model_dump_json().encode()


def _read(url: str) -> tuple[Owner | None, str]:
    """Whose lease it is, and which version of the file says so; nobody's where it cannot be read, no version without a file."""
    found = conditional.read(url)
    if found is None:
        return None, ""
    try:
        return Owner.model_validate_json(found.payload), found.version
    except ValueError:
        return None, found.version


def _born(pid: int) -> str:
    """The process's start time in clock ticks since boot (field 22 of /proc/PID/stat).

    Empty when it has ended, and on a system without /proc, where only heartbeats tell.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
