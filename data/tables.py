"""Tables of any known format as lines: CSV, TSV, JSONL, Parquet. One bad line costs one line."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import UserError


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a table: its values by column, or what is wrong with it. `number` counts as an editor would."""

    number: int
    values: dict[str, Any] | None
    problem: str = ""


def records_of(file: Path, wanted: Iterable[str]) -> list[Record]:
    """Every line of the table `file`; of a Parquet only the columns named in `wanted`, in lower case, are read."""
    suffix = file.suffix.lower()
    if suffix not in _TABLES:
        allowed = ", ".join(_TABLES)
        refuse(f"{file} is of no known format", f"give a folder or a table that ends in {allowed}")
    return list(_TABLES[suffix](file, frozenset(wanted)))


def chosen_column(
    columns: Sequence[str], asked: str | None, known: Sequence[str], option: str, file: Path
) -> str:
    """The column `asked` for, else the first of the `known` names that there is; raises UserError naming what there is."""
    by_lower = {name.lower(): name for name in reversed(columns)}
    found = asked if asked in columns else next((by_lower[n] for n in known if n in by_lower), None)
    if found is not None and asked in (None, found):
        return found
    near = difflib.get_close_matches(asked or known[0], columns, n=1, cutoff=0.5)
    hint = f"source.{option}={near[0]}" if near else f"source.{option} to one of them"
    lacks = f"the column {asked!r}" if asked else f"a column named {', '.join(known[:-1])} or {known[-1]}"
    raise UserError(f"{file} lacks {lacks}; it has {', '.join(columns)}: set {hint}")


def refuse(given: str, advice: str) -> NoReturn:
    """Raises UserError: what was given, and what to do."""
    raise UserError(f"{given}: {advice}")


def text_of(file: Path) -> str:
    """The text of `file`, bytes that are not UTF-8 as lone surrogates, so that one bad byte costs one row."""
    try:
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        refuse(f"{file} cannot be read ({error.strerror})", "check its permissions")


def _read_jsonl(file: Path, _: frozenset[str]) -> Iterator[Record]:
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Record(number, None, f"the line is not JSON ({error})")
            continue
        is_object = isinstance(values, dict)
        yield Record(number, values if is_object else None, "the line is not a JSON object")


def _read_csv(file: Path, _: frozenset[str]) -> Iterator[Record]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(text_of(file), newline=""), delimiter=delimiter, strict=True)
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
                    f"the header of {file} cannot be read ({error})", f"check that it is a {file.suffix} file"
                )
            yield Record(number, None, str(error))
            continue
        if header is None:
            header = cells
        elif len(cells) == len(header):
            yield Record(number, dict(zip(header, cells, strict=True)))
        elif cells:
            yield Record(number, None, f"{len(cells)} fields where the header has {len(header)}")


def _read_parquet(file: Path, wanted: frozenset[str]) -> Iterator[Record]:
    try:
        schema = pq.read_schema(file)
        textual = [field.name for field in schema if _is_textual(field.type)]
        table = pq.read_table(file, columns=[name for name in textual if name.lower() in wanted])
    except (pa.ArrowException, OSError) as error:
        refuse(f"{file} cannot be read as Parquet ({error})", "check the file")
    shown = dict.fromkeys(textual)
    columns = {name: _texts(table[name]) for name in table.column_names}
    for number in range(table.num_rows):
        yield Record(number + 1, shown | {name: values[number] for name, values in columns.items()})


def _is_textual(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    )


def _texts(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_integer(column.type):
        return column.to_pylist()
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    raw = column.cast(pa.large_binary()).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


_TABLES: dict[str, Callable[[Path, frozenset[str]], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
