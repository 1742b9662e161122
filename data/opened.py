"""The open columns of a dataset: a bounded number of shards, mapped where local, from the shard cache where remote."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from data import storage
from data.columns import array_path, offsets_path, open_array, open_ragged
from data.errors import UserError
from data.manifest import FileRecord, Snapshot
from data.schema import COLUMNS
from data.shard_cache import Fetcher, ShardCache
from data.tars import ShardReader

MAX_ARRAYS = 4096
"""Arrays kept open; a mapped one holds no descriptor, and Linux allows a process 65,530 mappings."""
MAX_TARS = 128
"""Tars kept open; a mapped one holds a descriptor, of which a process has 1,024."""


class OpenColumns:
    """Shards of the columns of `owner` (column -> the snapshot that wrote it), opened as they are asked for.

    The least recently used ones are closed. Safe to share among threads.
    """

    def __init__(self, owner: Mapping[str, Snapshot], cache: ShardCache | None = None) -> None:
        self._owner = owner
        self._given_cache = cache
        self._arrays: Recent = Recent(MAX_ARRAYS)
        self._tars: Recent = Recent(MAX_TARS)
        self._records = {column: {r.index: r for r in snapshot.shards} for column, snapshot in owner.items()}
        self._fetcher = Fetcher(lambda item: self._prepare(*item))

    def get(self, column: str, shard: int) -> Any:
        """A `ShardReader` for what lies in the tar, an array (n, *shape), or a `Ragged`."""
        if COLUMNS[column].kind == "tar":
            return self._tars.get(("tar", shard), lambda: self._open(column, shard))
        return self._arrays.get((column, shard), lambda: self._open(column, shard))

    def is_remote(self, column: str) -> bool:
        """Whether the column's shards go through the cache."""
        return not storage.is_local(self._owner[column].folder)

    def fetch_ahead(self, columns: Iterable[str], shards: Iterable[int]) -> None:
        """Begins to fetch what is remote of these, in the order of `shards`, in place of what was asked for before."""
        remote = [column for column in columns if self.is_remote(column)]
        self._fetcher.want((column, shard) for shard in shards for column in remote)

    def require_room(self, columns: Iterable[str], shards: Iterable[int]) -> None:
        """Raises UserError when what is remote of these does not fit the cache at once."""
        wanted, shards = [column for column in columns if self.is_remote(column)], list(shards)
        files = {
            (self._owner[c].folder, f.path): f.bytes
            for c in wanted
            for s in shards
            for f in self._files(c, s)
        }
        if (need := sum(files.values())) and need > self._cache.limit_bytes:
            raise UserError(
                f"training reads {len(shards)} shards of {', '.join(wanted)} at a time, {need / 1e9:.2f} GB, and the shard "
                f"cache holds {self._cache.limit_bytes / 1e9:.2f} GB: set DARKROOM_CACHE_GB to {need * 1.1 / 1e9:.2f} or more"
            )

    @cached_property
    def _cache(self) -> ShardCache:
        return self._given_cache or ShardCache.of_environment()

    def _files(self, column: str, shard: int) -> list[FileRecord]:
        paths = {
            "tar": (f"{shard:05d}.tar",),
            "array": (array_path(column, shard),),
            "ragged": (array_path(column, shard), offsets_path(column, shard)),
        }[COLUMNS[column].kind]
        return [self._records[column][shard].file(path) for path in paths]

    def _prepare(self, column: str, shard: int) -> None:
        with self._cache.entry(self._owner[column].folder, self._files(column, shard)):
            pass

    def _open(self, column: str, shard: int) -> Any:
        folder = self._owner[column].folder
        if storage.is_local(folder):
            return _opened(folder, column, shard)
        with self._cache.entry(folder, self._files(column, shard)) as local:
            return _opened(local, column, shard)


class Recent:
    """The most recently used values, at most `limit` of them; a value is made outside the lock, at times twice."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value under `key`, from `make` where it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value


def _opened(folder: str, column: str, shard: int) -> Any:
    kind = COLUMNS[column].kind
    if kind == "tar":
        return ShardReader(storage.join(folder, f"{shard:05d}.tar"))
    return open_ragged(folder, column, shard) if kind == "ragged" else open_array(folder, column, shard)
