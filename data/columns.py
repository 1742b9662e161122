"""Row-aligned arrays beside the shards: one `.npy` per column and shard, memory-mappable, never pickled.

Legend: n samples of a shard; values (n, *shape) for arrays, (sum of row lengths, *shape[1:]) for ragged columns.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.checksums import checksum
from data.errors import CorruptArtifact, ShardMismatch
from data.manifest import FileRecord, ShardRecord, recorded
from data.schema import COLUMNS

OFFSETS_DTYPE = "<i8"
_HEADER = threading.Lock()
"""Numpy parses a header as Python; in CPython 3.11, two threads that parse while garbage is collected end with a SystemError."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of varying length: row i is `values[offsets[i] : offsets[i + 1]]`, a view."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a column with {len(self)} rows")
        return self.values[self.offsets[row] : self.offsets[row + 1]]


def publish(folder: str, path: str, payload: bytes) -> FileRecord:
    """Writes `payload` at `path` under `folder` in one step and returns its record."""
    storage.write_bytes(storage.join(folder, path), payload)
    return recorded(path, checksum(payload))


def array_path(column: str, index: int) -> str:
    """Where shard `index` of `column` lies, relative to the artifact's folder."""
    return f"{column}/{column}_{index:05d}.npy"


def offsets_path(column: str, index: int) -> str:
    """Where the row boundaries of shard `index` of a ragged `column` lie, relative to the artifact's folder."""
    return array_path(f"{column}_offsets", index)


def write_array(folder: str, column: str, index: int, values: np.ndarray) -> FileRecord:
    """Publishes `values` (n, *shape) in the column's dtype, C order.

    Raises ValueError, naming the column and the first bad row, for a shape that the column does not have, a value that
    is not finite, or one that the dtype on disk cannot hold.
    """
    assert COLUMNS[column].kind == "array", f"{column} is not an array column"
    _check_shape(column, values.shape[1:], values.ndim > 0)
    stored = _stored(column, values, np.arange(len(values) + 1))
    return publish(folder, array_path(column, index), _npy(stored))


def write_ragged(
    folder: str, column: str, index: int, rows: Sequence[np.ndarray]
) -> tuple[FileRecord, FileRecord]:
    """Publishes rows of varying length: their concatenation, and the int64 row boundaries (n + 1,).

    Raises ValueError, naming the column and the first bad row, as `write_array` does and for rows of unequal width.
    """
    assert COLUMNS[column].kind == "ragged", f"{column} is not a ragged column"
    arrays = [np.asarray(row) for row in rows]
    for number, row in enumerate(arrays):
        _check_shape(column, row.shape, row.shape[1:] == arrays[0].shape[1:], number)
    width = arrays[0].shape[1:] if arrays else tuple(size or 0 for size in COLUMNS[column].shape[1:])
    offsets = np.cumsum([0, *map(len, arrays)], dtype=OFFSETS_DTYPE)
    values = np.concatenate(arrays) if arrays else np.zeros((0, *width), COLUMNS[column].dtype)
    stored = _stored(column, values, offsets)
    return (
        publish(folder, array_path(column, index), _npy(stored)),
        publish(folder, offsets_path(column, index), _npy(offsets)),
    )


def write_metadata(folder: str, index: int, keys: Sequence[str], captions: Sequence[str]) -> FileRecord:
    """Publishes clip-retrieval's metadata of one shard: a parquet of `image_path` (the sample's key) and `caption`."""
    if len(keys) != len(captions):
        raise ValueError(f"metadata of shard {index}: {len(keys)} keys but {len(captions)} captions")
    schema = pa.schema([("image_path", pa.string()), ("caption", pa.string())])
    table = pa.table({"image_path": list(keys), "caption": list(captions)}, schema=schema)
    return publish(folder, f"metadata/metadata_{index:05d}.parquet", parquet_bytes(table))


def read_keys(folder: str, index: int) -> list[str]:
    """The sample keys of one shard by its metadata, in order. Raises FileNotFoundError, and CorruptArtifact for another file."""
    url = storage.join(folder, f"metadata/metadata_{index:05d}.parquet")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(url)), columns=["image_path"])
    except pa.ArrowException as error:
        raise CorruptArtifact(f"{url} is no metadata: {str(error).splitlines()[0]}") from error
    return table["image_path"].to_pylist()


def parquet_bytes(table: pa.Table) -> bytes:
    """The table as a Parquet file; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def open_array(folder: str, column: str, index: int) -> np.ndarray:
    """Shard `index` of `column`, (n, *shape): a read-only memory map where local, else in memory.

    Raises FileNotFoundError, and CorruptArtifact for a file that is not an array of this column.
    """
    url = storage.join(folder, array_path(column, index))
    values = _load(url)
    wanted = COLUMNS[column]
    dims = 1 + len(wanted.shape) - (wanted.kind == "ragged")
    if values.dtype != np.dtype(wanted.dtype) or values.ndim != dims or not values.flags.c_contiguous:
        raise CorruptArtifact(
            f"{url} holds {values.dtype} {values.shape}, not C-ordered {wanted.dtype} with {dims} axes"
        )
    return values


def open_ragged(folder: str, column: str, index: int) -> Ragged:
    """Shard `index` of a ragged `column`. Raises as `open_array` does, and when the row boundaries do not fit the values."""
    values = open_array(folder, column, index)
    url = storage.join(folder, offsets_path(column, index))
    offsets = np.asarray(_load(url))
    fits = offsets.dtype == np.dtype(OFFSETS_DTYPE) and offsets.ndim == 1 and len(offsets) > 0
    if not fits or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise CorruptArtifact(
            f"{url} does not divide the {len(values)} values of {column} shard {index} into rows"
        )
    return Ragged(values, offsets)


def longest_row(folder: str, column: str, index: int) -> int:
    """Length of the longest row in shard `index` of a ragged `column`, 0 where it has none; reads the row boundaries alone."""
    return int(np.diff(_load(storage.join(folder, offsets_path(column, index)))).max(initial=0))


def verify_join(records: Mapping[str, ShardRecord]) -> None:
    """Returns when all shards describe the same samples in the same order.

    `records` maps the name to show (a folder, a column) to its shard. Raises ShardMismatch naming two that differ.
    """
    named = list(records.items())
    for name, record in named[1:]:
        first_name, first = named[0]
        pair = f"{first_name} shard {first.index:05d} and {name} shard {record.index:05d}"
        if record.samples != first.samples:
            raise ShardMismatch(
                f"{pair} are not row-aligned: {first.samples} samples against {record.samples}"
            )
        if record.keys != first.keys:
            raise ShardMismatch(
                f"{pair} are not row-aligned: their {record.samples} keys differ "
                f"(digest {first.keys[:12]} against {record.keys[:12]})"
            )


def _check_shape(column: str, shape: tuple[int, ...], regular: bool, row: int = 0) -> None:
    wanted = COLUMNS[column].shape
    fits = len(shape) == len(wanted) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True))
    if not (regular and fits):
        shown = tuple("any" if size is None else size for size in wanted)
        raise ValueError(
            f"{column}: row {row} has shape {shape}; the column has {shown} per sample, alike in every row"
        )


def _stored(column: str, values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    dtype = np.dtype(COLUMNS[column].dtype)
    if not np.can_cast(values.dtype, dtype, "same_kind"):
        raise ValueError(f"{column}: row 0 is {values.dtype}; the column stores {dtype}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype)
    if dtype.kind != "f" or np.isfinite(stored).all():
        return stored
    bad = np.argwhere(~np.isfinite(stored))[0]
    row = int(np.searchsorted(offsets, bad[0], side="right")) - 1
    value = values[tuple(bad)]
    problem = f"is beyond {dtype}'s {np.finfo(dtype).max}" if np.isfinite(value) else "is not finite"
    raise ValueError(f"{column}: a value of row {row} {problem} ({value}); nothing was written")


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _load(url: str) -> np.ndarray:
    try:
        if storage.is_local(url):
            with pa.memory_map(
                str(storage.local_path(url))
            ) as file:  # unlike numpy's map it keeps no descriptor
                return _array(file.read_buffer())
        return _array(pa.py_buffer(storage.read_bytes(url)))
    except (ValueError, EOFError) as error:
        raise CorruptArtifact(f"{url} is not a complete .npy file: {error}") from error


def _array(npy: pa.Buffer) -> np.ndarray:
    """The array in the bytes of a .npy file, as a read-only view of them. Raises ValueError."""
    stream = pa.BufferReader(npy)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(stream))
    if read_header is None:
        raise ValueError("an unknown version of the format")
    with _HEADER:
        shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    values = np.frombuffer(npy, dtype, math.prod(shape), offset=stream.tell())
    return values.reshape(shape, order="F" if is_fortran else "C")
