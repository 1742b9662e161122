"""Rows from a folder of NAME.jpg with NAME.txt, on this machine or in an object store, by sorted relative path.

The listing gives sizes and times. On this machine captions are read at once; in an object store, where each would cost a
request, a row carries its caption's URL (`Row.caption_url`), and the stamps of both files stand for what they say.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence

from data import storage
from data.rows import Row, checked, defective
from data.storage import Entry

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})


def is_image(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return posixpath.splitext(name)[1].lower() in IMAGE_SUFFIXES


def paired_rows(folder: str, entries: Sequence[Entry], numbers: Iterator[int]) -> Iterator[Row]:
    """The rows of the folder whose files, sorted, are `entries`; `numbers` gives them their indices."""
    texts = {entry.name: entry.stamp for entry in entries if entry.name.endswith(".txt")}
    row_of = _local_row if storage.is_local(folder) else _remote_row
    for entry in entries:
        if is_image(entry.name):
            caption = posixpath.splitext(entry.name)[0] + ".txt"
            stamp = texts.get(caption)
            yield row_of(next(numbers), folder, entry, caption if caption in texts else None, stamp)


def _local_row(index: int, folder: str, entry: Entry, caption: str | None, _: str | None) -> Row:
    text = None
    if caption is not None:
        try:
            with open(f"{folder}/{caption}", "rb") as file:  # noqa: PTH123  half the time of Path.open
                text = file.read().decode("utf-8", "surrogateescape")
        except FileNotFoundError:
            text = None
        except OSError as error:
            return defective(
                index, entry.name, "unreadable", f"the caption file cannot be read: {error.strerror}"
            )
    return checked(Row(index, f"{folder}/{entry.name}", text, entry.name, None, None, entry.stamp))


def _remote_row(index: int, folder: str, entry: Entry, caption: str | None, stamp: str | None) -> Row:
    image, text = storage.join(folder, entry.name), caption and storage.join(folder, caption)
    both = f"{entry.stamp} {stamp}" if caption else entry.stamp
    return checked(Row(index, image, None, entry.name, None, None, both, text))
