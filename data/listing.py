"""What lies at a place, and the rows that it lists: a folder, a table, archives, here or at any fsspec URL."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from data import archives, folders, storage
from data.records import SUFFIXES, reading, refuse, suffix_of
from data.rows import Row
from data.storage import Entry
from data.tables import Columns, metadata_rows, table_rows

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_GIVE = f"give an existing folder of images, .tar archives, or a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"


def rows_at(place: str, kind: str, columns: Columns) -> Iterator[Row]:
    """The rows of what lies at an absolute path or a URL, as `kind` (folder, table, webdataset or auto) says.

    Raises UserError where nothing lies, where something else does, and where it cannot be said which.
    """
    numbers = itertools.count()
    with reading(place):
        is_folder, is_there = storage.is_folder(place), storage.exists(place)
    if is_folder:
        return _folder_rows(place, kind, columns, numbers)
    if archives.is_archive(place) and (is_there or "{" in place):
        _expect(kind, "webdataset", place)
        found = archives.archives_of(place) if not is_there else [archives.one(place)]
        return archives.archive_rows(found, columns.caption, numbers)
    if not is_there:
        refuse(f"{place} does not exist", _GIVE)
    _expect(kind, "table", place)
    return table_rows(place, columns, numbers)


def _expect(asked: str, kind: str, place: str) -> None:
    if asked not in ("auto", kind):
        what = "is a file" if kind == "table" else "names archives"
        refuse(f"{place} {what}, but source.kind={asked} was given", f"set source.kind={kind}")


def _folder_rows(folder: str, kind: str, columns: Columns, numbers: Iterator[int]) -> Iterator[Row]:
    if kind in ("auto", "folder") and storage.is_local(
        folder
    ):  # many files need not be looked at to find one
        there = [name for name in METADATA_NAMES if storage.exists(f"{folder}/{name}")]
        if there:
            return metadata_rows(f"{folder}/{there[0]}", columns, numbers, storage.stamp)
    with reading(folder):
        entries = storage.list_tree(folder)
    names = {entry.name for entry in entries}
    kind = _kind_of(folder, names) if kind == "auto" else kind
    if kind == "webdataset":
        found = _some(archives.archives_in(folder, entries), folder, kind, ".tar")
        return archives.archive_rows(found, columns.caption, numbers)
    if kind == "table":
        tables = _some([e for e in entries if suffix_of(e.name) == ".parquet"], folder, kind, ".parquet")
        return _tables_rows(folder, tables, columns, numbers)
    if metadata := _metadata_in(names):
        stamps = {f"{folder}/{entry.name}": entry.stamp for entry in entries}
        return metadata_rows(f"{folder}/{metadata}", columns, numbers, stamps.get)
    return folders.paired_rows(folder, entries, numbers)


def _metadata_in(names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in METADATA_NAMES if name in there), None)


def _kind_of(folder: str, names: set[str]) -> str:
    """What a folder with these files is. Archives come before the Parquet files that img2dataset writes beside them."""
    if _metadata_in(names):
        return "folder"
    has_images, has_archives = any(map(folders.is_image, names)), any(map(archives.is_archive, names))
    if has_images and has_archives:
        refuse(f"{folder} holds images and .tar archives", "set source.kind=folder or source.kind=webdataset")
    if has_archives:
        return "webdataset"
    has_tables = any(suffix_of(name) == ".parquet" for name in names)
    return "table" if has_tables and not has_images else "folder"


def _some(found: list[Any], folder: str, kind: str, suffix: str) -> list[Any]:
    if not found:
        refuse(
            f"{folder} is a folder, but source.kind={kind} was given and it holds no {suffix}",
            "set source.kind=folder",
        )
    return found


def _tables_rows(
    folder: str, tables: Sequence[Entry], columns: Columns, numbers: Iterator[int]
) -> Iterator[Row]:
    for table in tables:
        yield from table_rows(f"{folder}/{table.name}", columns, numbers, table.name)
