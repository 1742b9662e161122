"""Where pairs come from: a listing of rows in a fixed order, made without opening one image.

    folder           metadata.jsonl, .csv or .parquet naming files of the folder (the ImageFolder convention);
                     without one, every NAME.jpg with its NAME.txt, by sorted relative path
    table            a CSV, TSV, JSONL or Parquet file of places and captions; relative paths start at its folder
    shapes, digits   built-in datasets, drawn into a folder first (`materialise`)

A row that is bad before its image is read carries a defect: it is counted, and never moves the rows after it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError

from data import storage
from data.captions import is_utf8
from data.config import Config, canonical_json, fingerprint, operational
from data.tables import Record, chosen_column, records_of, refuse, text_of

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
    path: str | None = operational(
        None,
        description="a folder, or a .csv, .tsv, .jsonl or .parquet file, on this machine; its content counts, not its place",
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
        refuse(
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
    for number, line in enumerate(text_of(file).split("\n"), start=1):
        if line.strip():
            try:
                found.append(Prompt.model_validate_json(line.encode("utf-8", "surrogateescape")))
            except ValidationError as error:
                problem = error.errors()[0]["msg"]
                refuse(
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
        refuse(
            f"source.kind={config.kind} is built in, but the path {config.path} was given too",
            "give one of the two",
        )


def _existing(config: SourceConfig) -> Path:
    assert config.kind not in _GENERATORS, (
        f"{config.kind} must be materialised before its files are asked for"
    )
    if config.path is None:
        refuse("no source was given", "name a folder or a table with --data, or set source.kind=shapes")
    if not storage.is_local(config.path):
        refuse(
            f"{config.path} is a URL",
            "a source's listing is read from this machine; its images may be object-store URLs",
        )
    path = storage.local_path(config.path).expanduser().absolute()
    if not path.exists():
        refuse(
            f"{path} does not exist",
            "give an existing folder of images, or a .csv, .tsv, .jsonl or .parquet file",
        )
    if config.kind == "folder" and not path.is_dir():
        refuse(f"{path} is a file, but source.kind=folder was given", "set source.kind=table")
    if config.kind == "table" and path.is_dir():
        refuse(f"{path} is a folder, but source.kind=table was given", "set source.kind=folder")
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


def _paired_rows(folder: Path) -> list[Row]:
    return [_paired_row(index, folder, name) for index, name in enumerate(sorted(_image_names(folder)))]


def _image_names(folder: Path) -> Iterator[str]:
    def complain(error: OSError) -> NoReturn:
        refuse(
            f"{error.filename} cannot be listed ({error.strerror})", "make it readable or move it elsewhere"
        )

    for parent, folders, files in os.walk(folder, onerror=complain):
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
    records = records_of(file, {name.lower() for name in wanted if name})
    columns = list(dict.fromkeys(name for record in records if record.values for name in record.values))
    if records and not any(record.values for record in records):
        refuse(
            f"not one row of {file} can be read ({records[0].problem})",
            f"check that it is a {file.suffix} file",
        )
    if not records:
        return []
    image_column = chosen_column(columns, config.image_column, IMAGE_COLUMNS, "image_column", file)
    caption_column = chosen_column(columns, config.caption_column, CAPTION_COLUMNS, "caption_column", file)
    return [_row(index, r, file, image_column, caption_column, is_table) for index, r in enumerate(records)]


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
