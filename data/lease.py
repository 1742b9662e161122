"""One builder per artifact: a lease file with owner and heartbeat. Dead owners are recognised and succeeded."""

from __future__ import annotations

import json
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

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0


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
def lease(folder: str, *, waiting: Callable[[Owner], None] = lambda _: None) -> Iterator[None]:
    """Holds the only lease on the artifact `folder` for the length of the block; waits while another live owner has it.

    `waiting` is called once with the present owner before the wait. An owner whose process has ended on this machine, or
    whose heartbeat is older than a minute, is succeeded. Object stores have no lease yet: the block runs at once.
    """
    if not storage.is_local(folder):
        yield
        return
    path = storage.local_path(folder) / "_meta" / "lease.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    _acquire(path, token, waiting)
    stopped = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, token, stopped), daemon=True, name="darkroom-lease")
    beating.start()
    try:
        yield
    finally:
        stopped.set()
        beating.join()
        if (holder := _read(path)) and holder.token == token:
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str, waiting: Callable[[Owner], None]) -> None:
    told = False
    while not _create(path, token):
        holder = _read(path)
        if holder is None or _is_dead(holder):
            _evict(path, holder)
            continue
        if not told:
            waiting(holder)
            told = True
        stopping.wait(1.0)


stopping = threading.Event()
"""Never set: a wait that signals interrupt."""


def _create(path: Path, token: str) -> bool:
    """Publishes a complete lease file if there is none: a hard link is atomic and fails where the name exists."""
    draft = path.with_name(f".tmp-{token}-lease")
    draft.write_text(_me(token).model_dump_json())
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _evict(path: Path, holder: Owner | None) -> None:
    """Removes a dead lease; of several that try, one renames it away and the others find it gone."""
    grave = path.with_name(f".tmp-{secrets.token_hex(8)}-dead")
    try:
        path.rename(grave)
    except FileNotFoundError:
        return
    buried = _read(grave)
    if buried is not None and (holder is None or buried.token != holder.token) and not _is_dead(buried):
        grave.rename(path)  # someone else was faster and lives: what was renamed away is theirs
        return
    grave.unlink(missing_ok=True)


def _beat(path: Path, token: str, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_SECONDS):
        holder = _read(path)
        if holder is None or holder.token != token:
            return
        storage.write_bytes(str(path), _me(token).model_dump_json().encode())


def _read(path: Path) -> Owner | None:
    try:
        return Owner.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _is_dead(owner: Owner) -> bool:
    if owner.host == socket.gethostname():
        return _born(owner.pid) != owner.born
    return time.time() - owner.beat > EXPIRY_SECONDS


def _me(token: str) -> Owner:
    pid = os.getpid()
    return Owner(token=token, host=socket.gethostname(), pid=pid, born=_born(pid), beat=time.time())


def _born(pid: int) -> str:
    """The process's start time in clock ticks since boot (field 22 of /proc/PID/stat); empty when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
