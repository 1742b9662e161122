"""Tables of any known format as lines, on any fsspec URL: CSV, TSV, JSONL, Parquet. One bad line costs one line."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.errors import DarkroomError, UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_HEAD = 1000
"""Lines of a JSONL that say which columns it has."""
_BATCH_ROWS = 1 << 15
_WINDOW = 1 << 16
"""Bytes read ahead in a remote Parquet: between the columns that are wanted lie those that are not."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a table: its values by column, or what is wrong with it. `number` counts as an editor would."""

    number: int
    values: dict[str, Any] | None
    problem: str = ""


def records_of(url: str, wanted: Iterable[str]) -> tuple[list[str], Iterator[Record]]:
    """The columns of a table, and its lines as they are read; of a Parquet only the `wanted` columns, in lower case.

    The columns of a JSONL are those of its first thousand lines. Raises UserError for a file that cannot be read or is of
    no known format, also while it is read.
    """
    records = _reader(url)(url, frozenset(wanted))
    head = list(itertools.islice(records, _HEAD))
    columns = list(dict.fromkeys(name for record in head for name in record.values or ()))
    if head and not columns:
        which = f"one of the first {_HEAD:,} rows" if len(head) == _HEAD else "one row"
        refuse(
            f"not {which} of {url} can be read ({head[0].problem})",
            f"check that it is a {suffix_of(url)} file",
        )
    return columns, itertools.chain(head, records)


def parquet_schema(url: str) -> pa.Schema:
    """The columns of a Parquet file. Raises UserError when it cannot be read."""
    with reading(url), storage.open_read(url, _WINDOW) as stream, _as_parquet(url):
        return pq.read_schema(stream)


def is_text(kind: pa.DataType) -> bool:
    """Whether a Parquet column of this type can hold places or captions."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def suffix_of(url: str) -> str:
    """The suffix of a file's name, in lower case, with its dot."""
    stem, dot, suffix = url.rpartition("/")[2].rpartition(".")
    return dot + suffix.lower() if stem else ""


def refuse(given: str, advice: str) -> NoReturn:
    """Raises UserError: what was given, and what to do."""
    raise UserError(f"{given}: {advice}")


@contextmanager
def reading(url: str) -> Iterator[None]:
    """What goes wrong inside while the source at `url` is listed becomes a UserError."""
    try:
        yield
    except DarkroomError:
        raise
    except ImportError as error:
        refuse(
            f"{url} needs a package that is not installed ({error})", "install it, for S3 with the extra `s3`"
        )
    except OSError as error:
        refuse(
            f"{error.filename or url} cannot be read ({error.strerror or error})",
            "check its place and its permissions",
        )
    except Exception as error:
        if storage.is_local(url):
            raise
        refuse(f"{url} cannot be read ({error})", "check the address, the network and the credentials")


def _reader(url: str) -> Callable[[str, frozenset[str]], Iterator[Record]]:
    if (suffix := suffix_of(url)) in SUFFIXES:
        return {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(suffix, _read_csv)
    refuse(
        f"{url} is of no known format",
        f"give a folder or a table that ends in {', '.join(SUFFIXES)}, or .tar archives",
    )


@contextmanager
def _text(url: str, newline: str) -> Iterator[io.TextIOWrapper]:
    """The file as text, bytes that are not UTF-8 as lone surrogates, so that one bad byte costs one row."""
    with reading(url), storage.open_read(url) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _read_jsonl(url: str, wanted: frozenset[str]) -> Iterator[Record]:
    del wanted
    with _text(url, "\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record(number, None, f"the line is not JSON ({error})")
                continue
            is_object = isinstance(values, dict)
            yield Record(number, values if is_object else None, "the line is not a JSON object")


def _read_csv(url: str, wanted: frozenset[str]) -> Iterator[Record]:
    del wanted
    with _text(url, "") as text:
        lines = csv.reader(text, delimiter="\t" if suffix_of(url) == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            number = lines.line_num + 1
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    refuse(
                        f"the header of {url} cannot be read ({error})",
                        f"check that it is a {suffix_of(url)} file",
                    )
                yield Record(number, None, str(error))
                continue
            if header is None:
                header = cells
            elif len(cells) == len(header):
                yield Record(number, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Record(number, None, f"{len(cells)} fields where the header has {len(header)}")


def _read_parquet(url: str, wanted: frozenset[str]) -> Iterator[Record]:
    with reading(url), storage.open_read(url, _WINDOW) as stream, _as_parquet(url):
        file = pq.ParquetFile(stream)
        textual = [field.name for field in file.schema_arrow if is_text(field.type)]
        columns = [name for name in textual if name.lower() in wanted]
        shown = dict.fromkeys(textual)
        if not textual:
            refuse(
                f"{url} has no column of text; it has {', '.join(file.schema_arrow.names)}",
                "captions are text",
            )
        if not columns and file.metadata.num_rows:
            yield Record(1, shown)  # enough to say which columns there are
        first = 1
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns) if columns else ():
            texts = (_texts(column) for column in batch.columns)
            for number, values in enumerate(zip(*texts, strict=True), start=first):
                yield Record(number, shown | dict(zip(columns, values, strict=True)))
            first += batch.num_rows


@contextmanager
def _as_parquet(url: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        refuse(f"{url} cannot be read as Parquet ({str(error).splitlines()[0]})", "check the file")


def _texts(column: pa.Array) -> list[Any]:
    if pa.types.is_integer(column.type):
        return column.to_pylist()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    raw = column.cast(pa.large_binary()).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogateescape") for value in raw]
