"""A folder of this machine that keeps the most recently used shards of remote artifacts, within a size.

{folder}/{name}/{path}     one entry: the files of one column of one shard; named by their digests, whole or not there
{folder}/.lock-{xx}        held (flock) by whoever fetches, opens or removes an entry whose name begins with xx
{folder}/.draft-{name}     an entry being fetched or removed, or what a killed process left of one
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import storage
from data.checksums import Checksum
from data.errors import CorruptArtifact, UserError
from data.manifest import FileRecord

log = logging.getLogger("darkroom.cache")

FOLDER_VARIABLE = "DARKROOM_CACHE"
SIZE_VARIABLE = "DARKROOM_CACHE_GB"
_READ_AHEAD = 8 << 20


@dataclass(frozen=True)
class ShardCache:
    """Remote files as local ones; any number of threads and processes of a machine may share the folder."""

    folder: Path
    limit_bytes: int
    """What the entries take up at most, but for those being fetched at the same time."""

    @classmethod
    def of_environment(cls) -> ShardCache:
        """The cache that $DARKROOM_CACHE (a folder; ~/.cache/darkroom) and $DARKROOM_CACHE_GB (64) name."""
        folder = os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "darkroom"
        size = os.environ.get(SIZE_VARIABLE, "64")
        try:
            limit = int(float(size) * 1e9)
        except ValueError as error:
            raise UserError(f"{SIZE_VARIABLE}={size!r} is not a number of gigabytes, such as 64") from error
        return cls(Path(folder), limit)

    @contextmanager
    def entry(self, source: str, files: Sequence[FileRecord]) -> Iterator[str]:
        """A local folder with `files` of the artifact `source`, fetched where it is not there yet.

        Whoever opens a file inside the block may read it for ever after; the path is good for the block alone. Raises
        CorruptArtifact when the artifact's files are not those on record, and OSError when they cannot be read.
        """
        name = hashlib.sha256("".join(record.sha256 for record in files).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_whole(name, files):
            self._make_room(sum(record.bytes for record in files))
        with self._locked(name):
            if not self._is_whole(name, files):
                self._fetch(name, source, files)
            os.utime(self.folder / name)
            yield str(self.folder / name)

    def fetched(self, source: str, files: Sequence[FileRecord]) -> Path:
        """As `entry`, of files that are read at once: what was asked for last is what goes last."""
        with self.entry(source, files) as folder:
            return Path(folder)

    def _is_whole(self, name: str, files: Sequence[FileRecord]) -> bool:
        try:
            return all((self.folder / name / r.path).stat().st_size == r.bytes for r in files)
        except OSError:
            return False

    def _fetch(self, name: str, source: str, files: Sequence[FileRecord]) -> None:
        draft = self.folder / f".draft-{name}"
        self._remove(name)
        for record in files:
            _download(storage.join(source, record.path), Path(storage.join(str(draft), record.path)), record)
        draft.rename(self.folder / name)

    def _remove(self, name: str) -> None:
        """Renamed before it is deleted, so that a kill leaves no entry with some of its files. The caller has the lock."""
        draft = self.folder / f".draft-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        if (self.folder / name).is_dir():
            (self.folder / name).rename(draft)
            shutil.rmtree(draft, ignore_errors=True)

    def _make_room(self, wanted: int) -> None:
        """Removes drafts that nobody is writing, then the least recently opened entries, until `wanted` bytes fit."""
        held = sorted((used, name, size) for name, used, size in self._entries())
        total = sum(size for _, _, size in held) + wanted
        for _, name, size in sorted(held, key=lambda e: not e[1].startswith(".draft-")):
            is_draft = name.startswith(".draft-")
            if total <= self.limit_bytes and not is_draft:
                return
            entry = name.removeprefix(".draft-")
            with self._locked(entry, wait=False) as is_mine:
                if is_mine:
                    shutil.rmtree(self.folder / name, ignore_errors=True) if is_draft else self._remove(entry)
                    total -= size

    def _entries(self) -> Iterator[tuple[str, int, int]]:
        """(name, when it was last opened in ns, bytes) of each entry and draft."""
        for path in self.folder.iterdir():
            try:
                if path.is_dir():
                    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                    yield path.name, path.stat().st_mtime_ns, size
            except FileNotFoundError:
                continue  # another process removed it

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether the lock was had; the kernel lets go of it when a process dies."""
        with (self.folder / f".lock-{name[:2]}").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


class Fetcher:
    """Background threads that work on the newest list of items, first things first; a new list replaces the old one."""

    def __init__(self, fetch: Callable[[Any], None], threads: int = 4) -> None:
        self._fetch, self._threads = fetch, threads
        self._wanted: deque[Any] = deque()
        self._running = 0
        self._lock = threading.Lock()

    def want(self, items: Iterable[Any]) -> None:
        """Returns at once. What cannot be fetched is logged: whoever needs it tries again, and raises."""
        with self._lock:
            self._wanted = deque(items)
            for _ in range(min(self._threads, len(self._wanted)) - self._running):
                self._running += 1
                threading.Thread(target=self._work, daemon=True, name="darkroom-fetch").start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    return
                item = self._wanted.popleft()
            try:
                self._fetch(item)
            except Exception as error:
                log.warning("%s was not fetched ahead: %s", item, error)


def _download(url: str, target: Path, record: FileRecord) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    found = Checksum()
    with storage.open_read(url, _READ_AHEAD) as stream, target.open("wb") as file:
        while chunk := stream.read(storage.CHUNK):
            found.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if (found.bytes, found.sha256) != (record.bytes, record.sha256):
        raise CorruptArtifact(
            f"{url} has {found.bytes} bytes of SHA-256 {found.sha256[:12]}, on record are {record.bytes} of "
            f"{record.sha256[:12]}: run `darkroom verify` on its store"
        )
