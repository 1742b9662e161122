"""The original bytes of rows, wherever they lie: files, object stores, archives, Parquet cells, the web.

Local files and cells are read when it is their turn; what a network brings is read ahead. The results come in the order of
the rows either way, each the bytes or the reason why there are none.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import BinaryIO

import pyarrow as pa

from data import storage, web
from data.ahead import in_order
from data.cells import CellReader
from data.errors import SampleError, UserError
from data.rows import Cell, Row, Slice, checked
from data.web import FetchRules, WebFetcher

UNAVAILABLE = "unavailable"
"""Reason of what a store could not deliver this time: it answered with an error of its own, too late or not at all."""
MISSING = "missing_image"
"""Reason of what is not at the place that the source names."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_PASSING_NAMES = (
    "EBUSY EIO EREMOTEIO EAGAIN ETIMEDOUT EPIPE ECONNRESET ECONNABORTED ECONNREFUSED EHOSTUNREACH ENETUNREACH"
)
_PASSING = {getattr(errno, name) for name in _PASSING_NAMES.split() if hasattr(errno, name)}
_MAX_CAPTION_BYTES = 1 << 20
_RUN_BYTES, _MAX_GAP, _RUNS_AT_ONCE = 4 << 20, 64 << 10, 8
"""Of pictures that lie one behind the other in a remote archive: what one request asks for at most, the bytes between two of
them that are no loss, and how many requests are under way."""

Original = bytes | SampleError


def is_retryable(reason: str) -> bool:
    """Whether what failed for `reason` may succeed another time, with nothing changed at its place."""
    return reason == UNAVAILABLE or web.is_retryable(reason)


class Originals:
    """Reads the originals of rows, at most `max_bytes` + 1 bytes of each, so that what is too large is seen to be.

    A context manager: files and connections stay open between neighbouring rows, up to its end. `fetch.concurrency` holds
    for object stores too.
    """

    def __init__(self, max_bytes: int, fetch: FetchRules | None = None) -> None:
        self._max_bytes, self._fetch = max_bytes, fetch or FetchRules()
        self._open = ExitStack()
        self._archive: tuple[str, BinaryIO] | None = None
        self._cells: CellReader | None = None

    def __enter__(self) -> Originals:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_files()
        self._open.close()

    def read_all(self, rows: Iterable[Row]) -> Generator[Original, None, None]:
        """The bytes of each row's image in the order of the rows, or why there are none.

        Reasons: `missing_image`, `unreadable`, `unavailable`, and those of `data.web`. OSError when this process has no
        descriptors or memory left, UserError where a store needs a package that is not installed.
        """
        rows = list(rows)
        readers = {"here": self._here, "remote": self._remote, "web": self._web}
        by_place = {place: [row for row in rows if _place(row) == place] for place in readers}
        ahead = {place: readers[place](by_place[place]) for place in readers}
        try:
            for row in rows:
                yield next(ahead[_place(row)])
        finally:
            for originals in ahead.values():
                originals.close()

    def with_captions(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the captions that their listing left to be read (`Row.caption_url`), many at once.

        Where the text file is gone there is no caption; where it cannot be read the row has a defect.
        """
        waiting = [row for row in rows if row.caption_url and not row.defect]
        if not waiting:
            return list(rows)
        threads = self._fetch.concurrency
        found = in_order(_with_caption, waiting, threads, threads)
        return [next(found) if row.caption_url and not row.defect else row for row in rows]

    def _here(self, rows: Sequence[Row]) -> Generator[Original, None, None]:
        for row in rows:
            yield _attempt(self._read_here, row)

    def _remote(self, rows: Sequence[Row]) -> Generator[Original, None, None]:
        runs = list(_runs(rows, self._max_bytes))
        threads = self._fetch.concurrency if len(runs) > 1 else 1
        if len(runs) < len(rows):
            threads = min(threads, _RUNS_AT_ONCE)
        with closing(in_order(self._read_run, runs, threads, threads)) as read:
            for originals in read:
                yield from originals

    def _web(self, rows: Sequence[Row]) -> Generator[Original, None, None]:
        if rows:
            fetcher = self._open.enter_context(WebFetcher(self._fetch))
            yield from fetcher.fetch_all((row.image for row in rows), self._max_bytes)

    def _read_here(self, row: Row) -> bytes:
        if isinstance(row.within, Cell):
            return self._read_cell(row.image, row.within)
        if isinstance(row.within, Slice):
            return self._read_slice(row.image, row.within)
        path = row.image.removeprefix("file://")
        facts = os.stat(path)  # noqa: PTH116  a Path costs as much as reading a small picture
        if not stat.S_ISREG(facts.st_mode):
            raise SampleError(
                "unreadable", "there is something other than a file at the place that the source names"
            )
        return _first_bytes(path, min(facts.st_size, self._max_bytes) + 1)

    def _read_slice(self, url: str, part: Slice) -> bytes:
        if self._archive is None or self._archive[0] != url:
            self._close_files()
            self._archive = url, storage.open_read(url)
        stream = self._archive[1]
        stream.seek(part.start)
        return _whole(stream.read(min(part.size, self._max_bytes + 1)), part, self._max_bytes)

    def _read_cell(self, url: str, cell: Cell) -> bytes:
        if self._cells is None or self._cells.place != (url, cell.column):
            self._close_files()
            self._cells = CellReader(url, cell.column)
        try:
            payload = self._cells.read(cell.row)
        except BaseException:
            self._close_files()
            raise
        if payload is None:
            raise SampleError(MISSING, "the cell that the source names is empty")
        return payload[: self._max_bytes + 1]

    def _read_run(self, run: Sequence[Row]) -> list[Original]:
        """The rows' bytes by one request; where it fails, by one each, so that no picture answers for its neighbours."""
        parts = [row.within for row in run if isinstance(row.within, Slice)]
        if len(parts) > 1:
            first, end = parts[0].start, parts[-1].start + parts[-1].size
            whole = _attempt(lambda row: storage.read_range(row.image, first, end - first), run[0])
            if isinstance(whole, bytes) and len(whole) == end - first:
                return [whole[part.start - first :][: part.size] for part in parts]
        return [_attempt(self._read_remote, row) for row in run]

    def _read_remote(self, row: Row) -> bytes:
        part = row.within
        assert not isinstance(part, Cell), "cells are read in turn"
        if part is None:
            return storage.read_range(row.image, 0, self._max_bytes + 1)
        size = min(part.size, self._max_bytes + 1)
        return _whole(storage.read_range(row.image, part.start, size), part, self._max_bytes)

    def _close_files(self) -> None:
        if self._archive is not None:
            self._archive[1].close()
        if self._cells is not None:
            self._cells.close()
        self._archive = self._cells = None


def _first_bytes(path: str, size: int) -> bytes:
    """At most `size` bytes of a file, read without Python's file objects, which cost a third of reading a small picture."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        payload = os.read(descriptor, size)
        while len(payload) < size and (more := os.read(descriptor, size - len(payload))):
            payload += more
        return payload
    finally:
        os.close(descriptor)


def _runs(rows: Sequence[Row], max_bytes: int) -> Iterator[list[Row]]:
    """The rows in their order, neighbours of one archive together where one request of bounded size brings them all."""
    run: list[Row] = []
    for row in rows:
        if run and not _follows(row, run, max_bytes):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _follows(row: Row, run: Sequence[Row], max_bytes: int) -> bool:
    first, last, part = run[0].within, run[-1].within, row.within
    if not (isinstance(first, Slice) and isinstance(last, Slice) and isinstance(part, Slice)):
        return False
    gap, span = part.start - last.start - last.size, part.start + part.size - first.start
    is_near = row.image == run[0].image and 0 <= gap <= _MAX_GAP and span <= _RUN_BYTES
    return is_near and max(part.size, first.size) <= max_bytes


def _place(row: Row) -> str:
    if row.image[:8].lower().startswith(("http://", "https://")):
        return "web"
    return "here" if storage.is_local(row.image) or isinstance(row.within, Cell) else "remote"


def _attempt(read: Callable[[Row], bytes], row: Row) -> Original:
    """What `read` returns, or its failure as a SampleError."""
    try:
        return read(row)
    except SampleError as error:
        return error
    except (FileNotFoundError, NotADirectoryError):
        return SampleError(MISSING, "there is no file at the place that the source names")
    except (pa.ArrowException, IndexError) as error:
        return SampleError("unreadable", f"the cell cannot be read: {type(error).__name__}")
    except Exception as error:
        return _failure(error, row.image)


def _failure(error: Exception, url: str) -> SampleError:
    """Why a file could not be read. Raises `error` when it is none of the file's, but of this process."""
    number = getattr(error, "errno", None)
    if number in _EXHAUSTED or (storage.is_local(url) and not isinstance(error, OSError)):
        raise error
    if isinstance(error, ImportError):
        raise UserError(f"{url} needs a package that is not installed ({error}): install it") from error
    what = getattr(error, "strerror", None) or type(error).__name__
    is_passing = number in _PASSING or not isinstance(error, OSError) or isinstance(error, TimeoutError)
    if not storage.is_local(url) and is_passing:
        return SampleError(UNAVAILABLE, f"the store did not deliver the file: {what}")
    return SampleError("unreadable", f"the file cannot be read: {what}")


def _with_caption(row: Row) -> Row:
    assert row.caption_url is not None
    payload = _attempt(lambda r: storage.read_range(r.caption_url or "", 0, _MAX_CAPTION_BYTES), row)
    if isinstance(payload, bytes):
        return checked(replace(row, caption=payload.decode("utf-8", "surrogateescape")))
    if payload.reason == MISSING:
        return row
    return replace(row, defect=(payload.reason, f"the caption file cannot be read: {payload}"))


def _whole(payload: bytes, part: Slice, max_bytes: int) -> bytes:
    if len(payload) < min(part.size, max_bytes + 1):
        raise SampleError("unreadable", "the archive ends before the image does")
    return payload
