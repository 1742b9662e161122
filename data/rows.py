"""One pair as a source lists it: where its picture lies, what it says, and what is wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from data.captions import is_utf8


@dataclass(frozen=True, slots=True)
class Slice:
    """A picture inside of a file: `size` bytes from byte `start` on."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A picture in a Parquet file: row `row` of the whole file, in a binary column or an `image` struct."""

    row: int
    column: str


@dataclass(frozen=True, slots=True)
class Row:
    """One pair as the source lists it."""

    index: int
    image: str
    """Absolute path, object-store URL or web address; empty when the row names none."""
    caption: str | None
    source_id: str
    """Names the row wherever the source lies: the relative path, or the place as a table gives it."""
    defect: tuple[str, str] | None = None
    """(reason, message) of a row known to be bad before its image is read."""
    within: Slice | Cell | None = None
    """The part of the file at `image` that is the picture; None: all of it."""
    stamp: str | None = None
    """`storage.Entry.stamp` of what is not read while listing; None where the listing does not tell."""
    caption_url: str | None = None
    """The text file whose content is the caption, of a row whose caption is read with its image."""


def checked(row: Row) -> Row:
    """The row as it can be written to a parquet; text that was not UTF-8 is shown with replacement characters."""
    if is_utf8(row.source_id) and (row.caption is None or is_utf8(row.caption)):
        return row
    problem = ("invalid_utf8", f"the {'caption' if is_utf8(row.source_id) else 'file name'} is not UTF-8")
    caption = row.caption and printable(row.caption)
    return replace(row, source_id=printable(row.source_id), caption=caption, defect=row.defect or problem)


def defective(index: int, source_id: str, reason: str, message: str) -> Row:
    """A row that only counts: what it names, and why it cannot be used."""
    return Row(index, "", None, printable(source_id), (reason, printable(message)))


def printable(text: str) -> str:
    """`text` with a replacement character for each byte that was not UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
