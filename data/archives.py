"""Rows from existing WebDataset shards: the headers of tar archives are walked, payloads of pictures are not read.

A sample is a run of members with one key: the path up to the first dot of its last part. Its image is the first member that
ends in jpg, jpeg, png, webp, gif, bmp, tif or tiff, its caption the txt, or the text of the json under `caption` or `text`.

An archive that was cut or overwritten gives the rows before the damage and one row more, `corrupt_archive`, naming the byte.
Peers take an intact zero block, a cut and a broken header alike for the end; here only zero blocks up to the end of the
file are one.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

from data import storage
from data.ahead import in_order
from data.folders import IMAGE_SUFFIXES
from data.records import reading, refuse
from data.rows import Row, Slice, checked, defective
from data.storage import Entry
from data.tables import CAPTION_COLUMNS

_BLOCK = tarfile.BLOCKSIZE
_WINDOW = 1 << 14
"""Bytes that one request for a remote header brings: the small members and the next header come with it."""
_AT_ONCE = 16
"""Remote archives walked at a time: each header waits for the one before it."""
_MAX_TEXT_BYTES = 1 << 20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_DESCRIBES_OTHERS = (*_PAX, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_PAYLOAD = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE),
    *(tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE),
)
"""Whatever size the header of one of these announces, nothing follows it."""


class Archive(NamedTuple):
    """One tar."""

    url: str
    name: str
    """Relative to what all archives of the source have in common."""
    stamp: str | None


class _Member(NamedTuple):
    name: str
    start: int
    size: int


class _Damage(Exception):
    """Where an archive can be read no further, and why."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(f"byte {offset}: {problem}")


def archives_in(folder: str, entries: Sequence[Entry]) -> list[Archive]:
    """The archives among the files of a folder, in their order."""
    names = ((entry, storage.join(folder, entry.name)) for entry in entries if is_archive(entry.name))
    return [Archive(url, entry.name, entry.stamp) for entry, url in names]


def one(url: str) -> Archive:
    """The archive at `url`, which is there."""
    return Archive(url, url.rpartition("/")[2], storage.stamp(url))


def archives_of(pattern: str) -> list[Archive]:
    """The archives that a path or URL with braces names, in its order.

    Raises UserError for one that is not there.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    try:
        urls = list(dict.fromkeys(braceexpand(pattern)))
    except UnbalancedBracesError as error:
        refuse(
            f"the braces of {pattern} do not match ({error})", "write them as in shards/{00000..00099}.tar"
        )
    with ThreadPoolExecutor(_AT_ONCE) as threads, reading(pattern):
        stamps = list(threads.map(storage.stamp, urls))
    if missing := [url for url, stamp in zip(urls, stamps, strict=True) if stamp is None]:
        refuse(
            f"{missing[0]} does not exist" + (f", nor do {len(missing) - 1} more" if missing[1:] else ""),
            "give existing .tar archives, as in shards/{00000..00099}.tar",
        )
    shared = _shared_folder(urls)
    return [Archive(url, url.removeprefix(shared), stamp) for url, stamp in zip(urls, stamps, strict=True)]


def is_archive(name: str) -> bool:
    """Whether a file's name is that of a tar archive."""
    return name.lower().endswith(".tar")


def archive_rows(
    archives: Sequence[Archive], caption_field: str | None, numbers: Iterator[int]
) -> Iterator[Row]:
    """The rows of the archives, one after the other; `caption_field` names the json's field that is the caption.

    Raises UserError for an archive that cannot be read at all.
    """
    at_once = 1 if all(storage.is_local(archive.url) for archive in archives) else _AT_ONCE
    listings = in_order(lambda archive: _samples(archive, caption_field), archives, at_once, at_once)
    for archive, samples in zip(archives, listings, strict=True):
        for sample in samples:
            index, source_id = next(numbers), f"{archive.name}{'/' if sample.key else ''}{sample.key}"
            if sample.defect:
                yield defective(index, source_id, *sample.defect)
            else:
                yield checked(
                    Row(index, archive.url, sample.caption, source_id, None, sample.image, archive.stamp)
                )


class _Sample(NamedTuple):
    key: str
    caption: str | None = None
    image: Slice | None = None
    defect: tuple[str, str] | None = None


def _samples(archive: Archive, caption_field: str | None) -> list[_Sample]:
    found: list[_Sample] = []
    with reading(archive.url), storage.open_read(archive.url, _WINDOW) as stream:
        try:
            for key, members in itertools.groupby(_members(stream), _key):
                if key is not None:
                    found.append(_sample(stream, key, list(members), caption_field))
        except _Damage as damage:
            found.append(_Sample("", defect=("corrupt_archive", f"{archive.name}, {damage}")))
    return found


def _key(member: _Member) -> str | None:
    """What the members of one sample share; None for files that belong to none."""
    folder, slash, name = member.name.rpartition("/")
    stem = name.partition(".")[0]
    return folder + slash + stem if stem and not stem.startswith("__") else None


def _sample(stream: BinaryIO, key: str, members: list[_Member], caption_field: str | None) -> _Sample:
    by_suffix: dict[str, _Member] = {}
    for member in members:
        by_suffix.setdefault(member.name.rpartition("/")[2].partition(".")[2].lower(), member)
    image = next((m for suffix, m in by_suffix.items() if f".{suffix}" in IMAGE_SUFFIXES), None)
    if image is None:
        return _Sample(key, defect=("missing_image", "the sample has no image"))
    try:
        caption = _caption(stream, by_suffix, caption_field)
    except ValueError as error:
        return _Sample(key, defect=("malformed_row", f"the caption cannot be read: {error}"))
    return _Sample(key, caption, Slice(image.start, image.size))


def _caption(stream: BinaryIO, members: dict[str, _Member], field: str | None) -> str | None:
    if "txt" in members and field is None:
        return _payload(stream, members["txt"]).decode("utf-8", "surrogateescape")
    if "json" not in members:
        return None
    values = json.loads(_payload(stream, members["json"]))
    if not isinstance(values, dict):
        raise ValueError("the json is not an object")
    text = next((values[name] for name in ([field] if field else CAPTION_COLUMNS) if name in values), None)
    if not isinstance(text, str | None):
        raise ValueError("the json's caption is no text")
    return text


def _payload(stream: BinaryIO, member: _Member) -> bytes:
    if member.size > _MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes, {_MAX_TEXT_BYTES} are allowed")
    return _read(stream, member.start, member.size)


def _members(stream: BinaryIO) -> Iterator[_Member]:
    """Every file of the archive up to its end, which must be there; raises _Damage where it can be read no further."""
    end, offset, name, facts = stream.seek(0, io.SEEK_END), 0, None, {}
    while any(block := _read(stream, offset, _BLOCK)):
        header = _header(block, offset)
        has_payload = header.type not in _WITHOUT_PAYLOAD
        size = int(facts.get("size", header.size)) if has_payload else 0
        start, offset = offset + _BLOCK, offset + _BLOCK + size + -size % _BLOCK
        if start + size > end:
            raise _Damage(start - _BLOCK, f"{header.name} has {size} bytes, which the file ends before")
        if header.type in _PAX:
            facts = _facts(_read(stream, start, size), start)
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            name = _read(stream, start, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type not in _DESCRIBES_OTHERS:
            if header.type in tarfile.REGULAR_TYPES:
                yield _Member(facts.get("path", name or header.name), start, size)
            name, facts = None, {}
    _check_end(stream, offset, end)


def _header(block: bytes, offset: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise _Damage(offset, "there is no intact header of a file") from None
    if header.type == tarfile.GNUTYPE_SPARSE:
        raise _Damage(offset, "a sparse file is not read")
    return header


def _facts(payload: bytes, offset: int) -> dict[str, str]:
    """The records of a pax header: each is its own length, a space, KEY=VALUE and a line feed."""
    facts: dict[str, str] = {}
    while payload.rstrip(b"\0"):
        digits, _, rest = payload.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, mark, value = payload[len(digits) + 1 : length - 1].partition(b"=")
        if not rest or not mark or payload[length - 1 : length] != b"\n":
            raise _Damage(offset, "the extended header cannot be read")
        facts[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        payload = payload[length:]
    if any(key.startswith("GNU.sparse") for key in facts) or not facts.get("size", "0").isdigit():
        raise _Damage(offset, "a sparse file is not read")
    return facts


def _check_end(stream: BinaryIO, offset: int, end: int) -> None:
    if end - offset < _BLOCK:
        raise _Damage(offset, "the end of the archive is missing: the file was cut")
    while offset < end:
        chunk = _read(stream, offset, storage.CHUNK)
        if any(chunk):
            raise _Damage(
                offset, "something follows the end of the archive, or a header was overwritten with zeros"
            )
        offset += len(chunk)


def _read(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    return stream.read(size)


def _shared_folder(urls: Sequence[str]) -> str:
    """What all the URLs begin with, up to a slash."""
    first, last = min(urls), max(urls)
    equal = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, equal) + 1]
