"""How a damaged file differs from its record: which bytes, and what lies there."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import numpy as np

from data import storage
from data.checksums import BLOCK, Checksum, changed_ranges, flipped_bits
from data.columns import offsets_path
from data.errors import CorruptArtifact
from data.manifest import FileRecord
from data.schema import COLUMNS
from data.tars import members_between

_SHOWN = 3
"""Ranges and names that a sentence lists before it only counts."""


def describe(url: str, record: FileRecord, found: Checksum) -> str:
    """What is wrong with the file at `url`, whose checksum `found` is not that of its `record`, and where."""
    ranges = changed_ranges(record.blocks, found)
    if found.bytes != record.bytes:
        same = _first_difference(record, found, ranges) if record.blocks else 0
        told = f"has {found.bytes} bytes, its manifest says {record.bytes}"
        return f"{told}; the first {same} bytes are as recorded" if same else told
    digests = f"SHA-256 is {found.sha256[:12]}…, its manifest says {record.sha256[:12]}…"
    if not record.blocks or not ranges:
        return f"its {found.bytes} bytes changed: {digests}"
    if bit := flipped_bit(url, record, found):
        byte, mask = bit
        what = f"bit {mask.bit_length() - 1} of byte {byte} flipped"
        ranges = [(byte, byte + 1)]
    else:
        listed = [f"{start} to {end - 1}" for start, end in ranges]
        what = f"bytes {_list(listed, 'ranges')} changed"
    hit = _list(list(dict.fromkeys(place for r in ranges[:_SHOWN] for place in _places(url, *r))), "places")
    return f"{what}: {hit} ({digests})" if hit else f"{what} ({digests})"


def flipped_bit(url: str, record: FileRecord, found: Checksum) -> tuple[int, int] | None:
    """(byte, mask) of the one bit by which the file at `url` differs from its record; None when it is not one bit.

    Certain, since the SHA-256 with that bit flipped back is compared. Raises OSError.
    """
    ranges = changed_ranges(record.blocks, found)
    is_one_block = len(ranges) == 1 and ranges[0][1] - ranges[0][0] <= BLOCK
    if not record.blocks or found.bytes != record.bytes or not is_one_block:
        return None
    start, end = ranges[0]
    at = start // BLOCK * 8
    then, now = int(record.blocks[at : at + 8], 16), int(found.blocks[at : at + 8], 16)
    for byte, mask in flipped_bits(then, now, end - start):
        if _sha256_with(url, start + byte, mask) == record.sha256:
            return start + byte, mask
    return None


def restored(url: str, record: FileRecord, found: Checksum) -> bytes | None:
    """The bytes that `record` describes, when the file at `url` differs from them by one bit; else None."""
    bit = flipped_bit(url, record, found)
    if bit is None:
        return None
    payload = bytearray(storage.read_bytes(url))
    payload[bit[0]] ^= bit[1]
    return bytes(payload)


def _first_difference(record: FileRecord, found: Checksum, ranges: list[tuple[int, int]]) -> int:
    shared = min(found.bytes, record.bytes)
    return min(ranges[0][0] if ranges else shared, shared // BLOCK * BLOCK)


def _sha256_with(url: str, at: int, mask: int) -> str:
    digest, offset = hashlib.sha256(), 0
    with storage.open_read(url) as stream:
        while chunk := stream.read(BLOCK):
            if offset <= at < offset + len(chunk):
                changed = bytearray(chunk)
                changed[at - offset] ^= mask
                chunk = bytes(changed)
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()


def _places(url: str, start: int, end: int) -> Iterator[str]:
    """What lies in the bytes [start, end) of a file whose format tells; nothing where it does not."""
    places = _PLACES.get(PurePosixPath(url).suffix)
    if places is None:
        return
    try:
        yield from places(url, start, end)
    except (OSError, ValueError, CorruptArtifact):
        yield "its header"  # what says where things lie is damaged itself


def _in_tar(url: str, start: int, end: int) -> Iterator[str]:
    names = members_between(url, start, end)
    if len(names) > 2:
        yield f"{names[0]} to {names[-1]} ({len(names)} files)"
    elif names:
        yield from names
    else:
        following = members_between(url, start, end + BLOCK)
        yield f"the header before {following[0]}" if following else "the end of the archive"


def _in_npy(url: str, start: int, end: int) -> Iterator[str]:
    with storage.open_read(url) as stream:
        shape, dtype, begins = npy_header(stream.read(4096))
    if start < begins:
        yield "its header"
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    if not shape or end <= begins or not row_bytes:
        return
    first, last = max(start - begins, 0) // row_bytes, (end - 1 - begins) // row_bytes
    folder, column, name = url.rsplit("/", 2)
    if column in COLUMNS and COLUMNS[column].kind == "ragged":
        index = int(PurePosixPath(name).stem.rsplit("_", 1)[1])
        payload = storage.read_bytes(storage.join(folder, offsets_path(column, index)))
        offsets = np.load(io.BytesIO(payload), allow_pickle=False)
        first, last = (int(row) for row in np.searchsorted(offsets, [first, last], side="right") - 1)
    yield f"row {first}" if first == last else f"rows {first} to {last}"


def npy_header(payload: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, byte where the values begin) from the start of a `.npy` file. Raises ValueError."""
    stream = io.BytesIO(payload)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype, stream.tell()


def _in_safetensors(url: str, start: int, end: int) -> Iterator[str]:
    with storage.open_read(url) as stream:
        length = int.from_bytes(stream.read(8), "little")
        tensors = json.loads(stream.read(min(length, 100 << 20)))
    if start < 8 + length:
        yield "its header"
    for name, tensor in tensors.items():
        if name != "__metadata__":
            begins, ends = (8 + length + offset for offset in tensor["data_offsets"])
            if begins < end and start < ends:
                yield f"tensor {name}"


_PLACES: dict[str, Callable[[str, int, int], Iterator[str]]] = {
    ".tar": _in_tar,
    ".npy": _in_npy,
    ".safetensors": _in_safetensors,
}


def _list(words: list[str], noun: str) -> str:
    more = f" and {len(words) - _SHOWN} more {noun}" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more
