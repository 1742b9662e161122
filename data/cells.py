"""Pictures in Parquet cells: a binary column, or the `image` struct of bytes and path that Hugging Face writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.records import parquet_schema

BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
_CELLS_AT_ONCE = 32
_STREAM_BYTES = 1 << 20
_WINDOW = 1 << 23


def bytes_column(url: str, asked: str | None) -> str | None:
    """The column of a Parquet that holds image bytes: binary, or Hugging Face's struct of bytes and path; None if none does."""
    schema = parquet_schema(url)
    found = {field.name.lower(): field.name for field in schema if _holds_bytes(field.type)}
    wanted = BYTES_COLUMNS if asked is None else (asked.lower(),)
    return next((found[name] for name in wanted if name in found), None)


class CellReader:
    """The cells of one column by row, best in rising order: read in batches from the row group's start on.

    Raises FileNotFoundError, OSError, or pyarrow's errors for a file that is no Parquet or lacks the column.
    """

    def __init__(self, url: str, column: str) -> None:
        self.place = url, column
        self._stream = storage.open_read(url, _WINDOW)
        try:
            self._file = pq.ParquetFile(self._stream, buffer_size=_STREAM_BYTES)
        except BaseException:
            self._stream.close()
            raise
        groups = (self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups))
        self._starts = list(itertools.accumulate(groups, initial=0))
        self._first, self._batch = 0, pa.record_batch([], names=[])
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def read(self, row: int) -> bytes | None:
        """The bytes of row `row` of the file; None where the cell holds none. IndexError behind the last row."""
        if not self._first <= row < self._first + self._batch.num_rows:
            self._seek(row)
        value = self._batch.column(0)[row - self._first].as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def close(self) -> None:
        """Closes the file."""
        self._batches = iter(())
        self._stream.close()

    def _seek(self, row: int) -> None:
        group = next((g for g, end in enumerate(self._starts[1:]) if row < end), None)
        if group is None:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        following = self._first + self._batch.num_rows
        if not self._starts[group] < following <= row:
            self._batches = self._file.iter_batches(
                _CELLS_AT_ONCE, row_groups=[group], columns=[self.place[1]], use_threads=False
            )
            following = self._starts[group]
        while True:
            self._first, self._batch = following, next(self._batches)
            following += self._batch.num_rows
            if row < following:
                return


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
