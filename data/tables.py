"""Rows from tables: one line names a picture by path, URL or address, or holds its bytes in a Parquet cell."""

from __future__ import annotations

import difflib
import functools
import posixpath
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec

from data import storage
from data.cells import bytes_column
from data.errors import UserError
from data.records import Record, records_of, suffix_of
from data.rows import Cell, Row, checked, defective
from data.urls import redacted

PLACE_COLUMNS = ("file_name", "image", "path", "url", "image_path", "image_url", "filename")
CAPTION_COLUMNS = ("text", "caption")
_WEB = ("http://", "https://")


class Columns(NamedTuple):
    """The columns that were asked for; None: the first known name."""

    image: str | None = None
    caption: str | None = None


def table_rows(url: str, columns: Columns, numbers: Iterator[int], name: str | None = None) -> Iterator[Row]:
    """The rows of one table. Relative places start at its folder; absolute ones, URLs and web addresses are taken too.

    `numbers` gives the rows their indices, `name` stands for the file in ids and messages. Of a Parquet with image bytes the
    bytes are not read. Raises UserError when the table cannot be read or lacks a column.
    """
    name = name or url.rpartition("/")[2]
    cells = bytes_column(url, columns.image) if suffix_of(url) == ".parquet" else None
    if cells is not None:
        return _cell_rows(url, name, cells, columns, numbers)
    return _place_rows(url, name, columns, numbers, functools.partial(_anywhere, url.rpartition("/")[0]))


def metadata_rows(
    url: str, columns: Columns, numbers: Iterator[int], stamp_of: Callable[[str], str | None]
) -> Iterator[Row]:
    """The rows of a folder's metadata file: its places stay in the folder. `stamp_of` knows a relative path's stamp."""
    inside = functools.partial(_inside, url.rpartition("/")[0], stamp_of)
    return _place_rows(url, url.rpartition("/")[2], columns, numbers, inside)


def chosen_column(
    columns: Sequence[str], asked: str | None, known: Sequence[str], option: str, url: str
) -> str:
    """The column `asked` for, else the first of the `known` names that there is; raises UserError naming what there is."""
    by_lower = {name.lower(): name for name in reversed(columns)}
    found = asked if asked in columns else next((by_lower[n] for n in known if n in by_lower), None)
    if found is not None and asked in (None, found):
        return found
    near = difflib.get_close_matches(asked or known[0], columns, n=1, cutoff=0.5)
    hint = f"source.{option}={near[0]}" if near else f"source.{option} to one of them"
    lacks = f"the column {asked!r}" if asked else f"a column named {', '.join(known[:-1])} or {known[-1]}"
    raise UserError(f"{url} lacks {lacks}; it has {', '.join(columns)}: set {hint}")


Locate = Callable[[int, str, str | None], Row]
"""(index, place as the table gives it, caption) -> the row with its image's place."""


def _place_rows(
    url: str, name: str, columns: Columns, numbers: Iterator[int], locate: Locate
) -> Iterator[Row]:
    wanted = {*PLACE_COLUMNS, *CAPTION_COLUMNS, columns.image, columns.caption}
    names, records = records_of(url, {n.lower() for n in wanted if n})
    if not names:
        return
    places = chosen_column(names, columns.image, PLACE_COLUMNS, "image_column", url)
    captions = chosen_column(names, columns.caption, CAPTION_COLUMNS, "caption_column", url)
    for record in records:
        yield _place_row(next(numbers), record, f"{name}:{record.number}", places, captions, locate)


def _place_row(index: int, record: Record, line: str, places: str, captions: str, locate: Locate) -> Row:
    if record.values is None:
        return defective(index, line, "malformed_row", f"{line}: {record.problem}")
    place, caption = _text(record.values.get(places)), _text(record.values.get(captions))
    if not isinstance(place, str) or not place or "\0" in place:
        return defective(index, line, "malformed_row", f"{line}: {places} names no file")
    if not isinstance(caption, str | None):
        return defective(index, line, "malformed_row", f"{line}: {captions} holds no text")
    return checked(locate(index, place, caption))


def _cell_rows(url: str, name: str, column: str, columns: Columns, numbers: Iterator[int]) -> Iterator[Row]:
    stamp = storage.stamp(url)
    wanted = {*CAPTION_COLUMNS, columns.caption}
    names, records = records_of(url, {n.lower() for n in wanted if n})
    if not names:
        return
    captions = chosen_column(names, columns.caption, CAPTION_COLUMNS, "caption_column", url)
    for record in records:
        assert record.values is not None, "every row of a Parquet can be read"
        caption, cell = _text(record.values[captions]), Cell(record.number - 1, column)
        yield checked(Row(next(numbers), url, caption, f"{name}:{record.number}", None, cell, stamp))


def _text(value: Any) -> Any:
    """Numbers as the text that they were written as; anything but text and nothing stays, to be refused."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _anywhere(folder: str, index: int, place: str, caption: str | None) -> Row:
    """A row of a table: its place may be relative, absolute, an object-store URL or a web address."""
    if "://" in place:
        problem = _unsupported(place)
        stamp = storage.stamp(place) if storage.is_local(place) else None
        return Row(index, "" if problem else place, caption, redacted(place), problem, None, stamp)
    if place.startswith("/") and storage.is_local(folder):
        return Row(index, place, caption, place, None, None, storage.stamp(place))
    return _inside(folder, storage.stamp if storage.is_local(folder) else _unknown, index, place, caption)


def _inside(
    folder: str, stamp_of: Callable[[str], str | None], index: int, place: str, caption: str | None
) -> Row:
    """A row whose place is a path below the folder."""
    relative = posixpath.normpath(place)
    if place.startswith("/") or "://" in place or relative.split("/", 1)[0] == "..":
        problem = ("path_escapes_source", "the path leaves the source's folder")
        return Row(index, "", caption, place, problem)
    image = f"{folder}/{relative}"
    return Row(index, image, caption, relative, None, None, stamp_of(image))


def _unknown(url: str) -> None:
    """Objects that a table names are taken as immutable: one request for each would cost more than the listing."""
    del url


def _unsupported(place: str) -> tuple[str, str] | None:
    if place.startswith(_WEB) and "::" not in place:
        return None
    schemes = [part.partition("://")[0].lower() for part in place.split("::")]
    if wrong := next((s for s in schemes if f"{s}://" in _WEB or not _is_known(s)), None):
        return ("unsupported_url", f"pictures are not read from such {wrong} addresses")
    return None


@functools.cache
def _is_known(scheme: str) -> bool:
    return scheme not in {"ftp", "sftp"} and scheme in fsspec.available_protocols()
