"""Where pairs come from: a listing of rows in a fixed order, made without opening one image.

    folder           metadata.jsonl, .csv or .parquet naming files of the folder (the ImageFolder convention);
                     without one, every NAME.jpg with its NAME.txt, by sorted relative path
    table            a CSV, TSV, JSONL or Parquet file of places and captions; relative paths start at its folder
    shapes, digits   built-in datasets, drawn into a folder first (`materialise`)

A row that is bad before its image is read carries a defect: it is counted, and never moves the rows after it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from data import storage
from data.captions import is_utf8
from data.config import Config, canonical_json, fingerprint
from data.errors import UserError

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
IMAGE_COLUMNS = ("file_name", "image", "path", "url", "image_path", "image_url", "filename")
CAPTION_COLUMNS = ("text", "caption")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
GENERATOR_VERSIONS = {"shapes": 1, "digits": 1}
"""Raised when a built-in dataset draws other pictures than before for the same count and seed."""


class SourceConfig(Config):
    """Which pairs to read."""

    kind: Literal["auto", "folder", "table", "shapes", "digits"] = Field(
        default="auto",
        description="auto: folder or table, whichever lies at `path`; shapes and digits are built in and take no path",
    )
    path: str | None = Field(
        default=None, description="a folder, or a .csv, .tsv, .jsonl or .parquet file, on this machine"
    )
    limit: int | None = Field(default=None, ge=1, description="take the first rows only")
    image_column: str | None = Field(
        default=None, description=f"column of the places; None: one of {', '.join(IMAGE_COLUMNS)}"
    )
    caption_column: str | None = Field(
        default=None, description=f"column of the captions; None: {' or '.join(CAPTION_COLUMNS)}"
    )
    count: int = Field(default=6000, ge=1, description="pictures that a built-in dataset draws")
    seed: int = Field(default=0, ge=0, description="seed of a built-in dataset")


@dataclass(frozen=True, slots=True)
class Row:
    """One pair as the source lists it."""

    index: int
    image: str
    """Absolute path or object-store URL; empty when the row names none."""
    caption: str | None
    source_id: str
    """Names the row wherever the source lies: the relative path, or the place as a table gives it."""
    defect: tuple[str, str] | None = None
    """(reason, message) of a row known to be bad before its image is read."""


class SourceSummary(Config):
    """What a plan needs to know of a source."""

    digest: str
    rows: int


class Prompt(Config):
    """A text to draw for evaluation, and what its picture must show where the dataset knows that."""

    text: str
    heldout: bool = False
    truth: dict[str, Any] | None = None


def materialise(config: SourceConfig, folder: Path) -> SourceConfig:
    """The source as files: draws a built-in dataset into a folder of its own under `folder`; others come back unchanged.

    Drawing the same dataset again finds it there and does nothing.
    """
    if config.kind not in _GENERATORS:
        return config
    _refuse_path(config)
    target = folder / f"{config.kind}-{_builtin_digest(config)}"
    _GENERATORS[config.kind](target, config.count, config.seed)
    return SourceConfig(kind="folder", path=str(target), limit=config.limit)


def list_rows(config: SourceConfig) -> list[Row]:
    """Every row of a folder or table in its fixed order, at most `limit`; of rows with one id only the first is sound.

    Raises UserError for a missing, empty or unreadable source, an unknown format, or a column that is not there.
    """
    path = _existing(config)
    if path.is_dir():
        metadata = next((path / name for name in METADATA_NAMES if (path / name).is_file()), None)
        rows = _metadata_rows(metadata, config, is_table=False) if metadata else _paired_rows(path)
    else:
        rows = _metadata_rows(path, config, is_table=True)
    if not rows:
        _fail(
            f"{path} has no rows",
            f"give a folder with images ({', '.join(sorted(IMAGE_SUFFIXES))}) or a metadata file",
        )
    return _without_duplicates(rows[: config.limit])


def source_digest(config: SourceConfig) -> str:
    """Identity of the rows without opening an image: ids, captions and defects, sizes and modification times.

    Objects behind URLs are taken as immutable. A built-in dataset is identified by what draws it. Raises as `list_rows`.
    """
    return describe(config).digest


def describe(config: SourceConfig) -> SourceSummary:
    """Digest and number of rows; a built-in dataset need not have been drawn. Raises as `list_rows`."""
    if config.kind in _GENERATORS:
        _refuse_path(config)
        rows = min(_drawn(config), config.limit or config.count)
        return SourceSummary(digest=_builtin_digest(config, config.limit), rows=rows)
    listed = list_rows(config)
    digest = hashlib.sha256()
    for row in listed:
        reason = row.defect and row.defect[0]
        digest.update(canonical_json([row.source_id, row.caption, reason, _stamp(row)]))
    return SourceSummary(digest=fingerprint(digest.hexdigest()), rows=len(listed))


def prompts(config: SourceConfig, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of `prompts.jsonl` in the source's folder; none where there is no such file.

    Raises UserError naming the line that is no prompt.
    """
    path = _existing(config)
    file = (path if path.is_dir() else path.parent) / "prompts.jsonl"
    if not file.is_file():
        return []
    found: list[Prompt] = []
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            try:
                found.append(Prompt.model_validate_json(line.encode("utf-8", "surrogateescape")))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                _fail(
                    f"line {number} of {file} is no prompt ({problem})",
                    'write {"text": …, "heldout": …, "truth": …}',
                )
    return found[:limit]


def _draw_shapes(folder: Path, count: int, seed: int) -> None:
    from data import shapes

    shapes.write_folder(folder, count=count, seed=seed)


def _draw_digits(folder: Path, count: int, seed: int) -> None:
    from data import digits

    digits.write_folder(folder, count=count, seed=seed)


_GENERATORS: dict[str, Callable[[Path, int, int], None]] = {"shapes": _draw_shapes, "digits": _draw_digits}


def _drawn(config: SourceConfig) -> int:
    """Pictures that a built-in dataset draws; there are only so many digits."""
    if config.kind == "digits":
        from data.digits import TRAINING_DIGITS

        return min(config.count, TRAINING_DIGITS)
    return config.count


def _builtin_digest(config: SourceConfig, limit: int | None = None) -> str:
    return fingerprint(config.kind, config.count, config.seed, limit, GENERATOR_VERSIONS[config.kind])


def _refuse_path(config: SourceConfig) -> None:
    if config.path is not None:
        _fail(
            f"source.kind={config.kind} is built in, but the path {config.path} was given too",
            "give one of the two",
        )


def _fail(given: str, advice: str) -> NoReturn:
    raise UserError(f"{given}: {advice}")


def _existing(config: SourceConfig) -> Path:
    assert config.kind not in _GENERATORS, (
        f"{config.kind} must be materialised before its files are asked for"
    )
    if config.path is None:
        _fail("no source was given", "name a folder or a table with --data, or set source.kind=shapes")
    if not storage.is_local(config.path):
        _fail(
            f"{config.path} is a URL",
            "a source's listing is read from this machine; its images may be object-store URLs",
        )
    path = storage.local_path(config.path).expanduser().absolute()
    if not path.exists():
        _fail(
            f"{path} does not exist",
            "give an existing folder of images, or a .csv, .tsv, .jsonl or .parquet file",
        )
    if config.kind == "folder" and not path.is_dir():
        _fail(f"{path} is a file, but source.kind=folder was given", "set source.kind=table")
    if config.kind == "table" and path.is_dir():
        _fail(f"{path} is a folder, but source.kind=table was given", "set source.kind=folder")
    return path


def _stamp(row: Row) -> list[int] | None:
    """Size and modification time of a sound row's local file; None where there is none to look at."""
    if row.defect or not storage.is_local(row.image):
        return None
    try:
        facts = storage.local_path(row.image).stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


# --- rows -----------------------------------------------------------------------------------------------------------


def _paired_rows(folder: Path) -> list[Row]:
    return [_paired_row(index, folder, name) for index, name in enumerate(sorted(_image_names(folder)))]


def _image_names(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> NoReturn:
        _fail(
            f"{error.filename} cannot be listed ({error.strerror})", "make it readable or move it elsewhere"
        )

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name).relative_to(folder).as_posix()


def _paired_row(index: int, folder: Path, name: str) -> Row:
    image = folder / name
    try:
        caption = image.with_suffix(".txt").read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        caption = None
    except OSError as error:
        problem = ("unreadable", f"the caption file cannot be read: {error.strerror}")
        return Row(index, str(image), None, _printable(name), problem)
    return _checked(Row(index, str(image), caption, name))


def _metadata_rows(file: Path, config: SourceConfig, *, is_table: bool) -> list[Row]:
    wanted = {*IMAGE_COLUMNS, *CAPTION_COLUMNS, config.image_column, config.caption_column}
    records = _records(file, {name.lower() for name in wanted if name})
    columns = list(dict.fromkeys(name for record in records if record.values for name in record.values))
    if records and not any(record.values for record in records):
        _fail(
            f"not one row of {file} can be read ({records[0].problem})",
            f"check that it is a {file.suffix} file",
        )
    if not records:
        return []
    image_column = _choose(columns, config.image_column, IMAGE_COLUMNS, "image_column", file)
    caption_column = _choose(columns, config.caption_column, CAPTION_COLUMNS, "caption_column", file)
    return [_row(index, r, file, image_column, caption_column, is_table) for index, r in enumerate(records)]


def _choose(columns: Sequence[str], asked: str | None, known: Sequence[str], option: str, file: Path) -> str:
    by_lower = {name.lower(): name for name in reversed(columns)}
    found = asked if asked in columns else next((by_lower[n] for n in known if n in by_lower), None)
    if found is not None and asked in (None, found):
        return found
    near = difflib.get_close_matches(asked or known[0], columns, n=1, cutoff=0.5)
    hint = f"source.{option}={near[0]}" if near else f"source.{option} to one of them"
    lacks = f"the column {asked!r}" if asked else f"a column named {', '.join(known[:-1])} or {known[-1]}"
    _fail(f"{file} lacks {lacks}; it has {', '.join(columns)}", f"set {hint}")


def _row(
    index: int, record: Record, file: Path, image_column: str, caption_column: str, is_table: bool
) -> Row:
    place = f"{file.name}:{record.number}"
    if record.values is None:
        return Row(index, "", None, place, ("malformed_row", f"{place}: {record.problem}"))
    name, caption = (_cell(record.values.get(column)) for column in (image_column, caption_column))
    if not isinstance(name, str) or not name or "\0" in name:
        return Row(index, "", None, place, ("malformed_row", f"{place}: {image_column} names no file"))
    if not isinstance(caption, str | None):
        return Row(index, "", None, place, ("malformed_row", f"{place}: {caption_column} holds no text"))
    return _checked(_located(Row(index, "", caption, name), file.parent, is_table))


def _cell(value: Any) -> Any:
    """Numbers as the text that they were written as; anything but text and nothing stays, to be refused."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _located(row: Row, folder: Path, is_table: bool) -> Row:
    """The row with its image's place. A folder's rows stay in the folder; a table may also give absolute places."""
    name = row.source_id
    if is_table and "://" in name:
        if {part.partition("://")[0] for part in name.split("::")} & {"http", "https", "ftp"}:
            problem = ("unsupported_url", "pictures on the web are not fetched: download them first")
            return replace(row, defect=problem)
        return replace(row, image=name)
    if is_table and name.startswith("/"):
        return replace(row, image=name)
    relative = posixpath.normpath(name)
    if name.startswith("/") or "://" in name or relative.split("/")[0] == "..":
        problem = ("path_escapes_source", "the path leaves the source's folder")
        return replace(row, defect=problem)
    return replace(row, image=str(folder / relative), source_id=relative)


def _checked(row: Row) -> Row:
    """The row as it can be written to a parquet; text that was not UTF-8 is shown with replacement characters."""
    if is_utf8(row.source_id) and is_utf8(row.caption or ""):
        return row
    problem = ("invalid_utf8", f"the {'caption' if is_utf8(row.source_id) else 'file name'} is not UTF-8")
    caption = row.caption and _printable(row.caption)
    return replace(row, source_id=_printable(row.source_id), caption=caption, defect=row.defect or problem)


def _printable(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _without_duplicates(rows: Sequence[Row]) -> list[Row]:
    first: dict[str, int] = {}
    kept: list[Row] = []
    for row in rows:
        earlier = row.index if row.defect else first.setdefault(row.source_id, row.index)
        problem = ("duplicate_key", f"row {earlier} already names this image")
        kept.append(row if earlier == row.index else replace(row, defect=problem))
    return kept


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a table: its values by column, or what is wrong with it. `number` counts as an editor would."""

    number: int
    values: dict[str, Any] | None
    problem: str = ""


def _records(file: Path, wanted: Iterable[str]) -> list[Record]:
    suffix = file.suffix.lower()
    if suffix not in _TABLES:
        allowed = ", ".join(_TABLES)
        _fail(f"{file} is of no known format", f"give a folder or a table that ends in {allowed}")
    return list(_TABLES[suffix](file, frozenset(wanted)))


def _text(file: Path) -> str:
    """The text, bytes that are not UTF-8 as lone surrogates, so that one bad byte costs one row."""
    try:
        return file.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        _fail(f"{file} cannot be read ({error.strerror})", "check its permissions")


def _read_jsonl(file: Path, _: frozenset[str]) -> Iterator[Record]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
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
    lines = csv.reader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                _fail(
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
        _fail(f"{file} cannot be read as Parquet ({error})", "check the file")
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
