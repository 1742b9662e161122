"""WebDataset tars: written from bytes alone, so that equal samples give equal archives; read by row without unpacking."""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO

from data import storage
from data.checksums import BLOCK as _CHUNK
from data.checksums import Checksum
from data.errors import CorruptArtifact

BLOCK = 512
RECORD = 20 * BLOCK
_PADDING = bytes(BLOCK)
_IMAGE_EXTENSIONS = ("jpg", "png", "webp")


class TarWriter:
    """Writes ustar members that depend on name and content alone: no times, no owners.

    Bytes are gathered and go to `stream` about a MiB at a time, each hashed on its way; `finish` writes what is left, and only
    after it are all of them in the stream and in the digests.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._checksum = Checksum()
        self._gathered: list[bytes] = []
        self._waiting = 0

    def add(self, name: str, payload: bytes) -> None:
        """Appends one file; `name` is ASCII of at most 100 bytes, `payload` below 8 GiB."""
        size, padding = len(payload), -len(payload) % BLOCK
        self._gathered += (_tar_header(name, size), payload, _PADDING[:padding])
        self._waiting += BLOCK + size + padding
        if self._waiting >= _CHUNK:
            self._write()

    def add_sample(self, members: bytes) -> None:
        """Appends whole files with their headers and padding, as another archive has them."""
        assert len(members) % BLOCK == 0, f"{len(members)} bytes are no whole blocks"
        self._gathered.append(members)
        self._waiting += len(members)
        if self._waiting >= _CHUNK:
            self._write()

    def finish(self) -> None:
        """Writes the end of the archive: two zero blocks, then zeros up to a whole record."""
        self._gathered.append(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))
        self._write()

    @property
    def bytes(self) -> int:
        """Bytes added so far."""
        return self._checksum.bytes + self._waiting

    @property
    def sha256(self) -> str:
        """Hex digest of the finished archive."""
        return self._checksum.sha256

    @property
    def blocks(self) -> str:
        """CRC-32 of each MiB of the finished archive, as in a `FileRecord`."""
        return self._checksum.blocks

    def _write(self) -> None:
        whole = b"".join(self._gathered)
        self._stream.write(whole)
        self._checksum.update(whole)
        self._gathered.clear()
        self._waiting = 0


class ShardReader:
    """Random access to a shard's tar by row; memory-mapped where local, never unpacked; safe to share among threads.

    Opening walks every header once and raises CorruptArtifact, naming the file and the byte, unless the archive ends
    as one should and each sample has its image, json and txt, adjacent, under a key of its own. FileNotFoundError
    where there is no file. `len()` is the number of samples, `keys` names them in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._buffer = _map(url)
        try:
            samples = list(_samples(self._buffer, url))
        except BaseException:
            self.close()
            raise
        self.keys = tuple(key for key, _ in samples)
        self._members = [members for _, members in samples]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def starts(self) -> list[int]:
        """Byte of each sample's first header."""
        return [min(start for start, _ in members.values()) - BLOCK for members in self._members]

    @property
    def end(self) -> int:
        """Byte behind the last sample's padding, where the end of the archive begins."""
        start, size = max(self._members[-1].values()) if self._members else (0, 0)
        return start + size + -size % BLOCK

    def raw(self, start: int, end: int) -> bytes:
        """The archive's bytes [start, end); between two `starts`, a sample's files with headers and padding."""
        return self._buffer[start:end]

    def image(self, row: int) -> bytes:
        """The encoded picture of sample `row`."""
        return self._payload(row, "image")

    def caption(self, row: int) -> str:
        """The caption of sample `row`. Raises CorruptArtifact when it is not UTF-8."""
        try:
            return self._payload(row, "txt").decode()
        except UnicodeDecodeError as error:
            raise CorruptArtifact(f"{self.url}: the caption of {self.keys[row]} is not UTF-8") from error

    def fields(self, row: int) -> dict[str, Any]:
        """The json member of sample `row`: its line of the parquet. Raises CorruptArtifact when it is not JSON."""
        try:
            return json.loads(self._payload(row, "json"))
        except ValueError as error:
            raise CorruptArtifact(f"{self.url}: the json of {self.keys[row]} cannot be parsed") from error

    def close(self) -> None:
        """Unmaps a local file; nothing may be read afterwards."""
        if isinstance(self._buffer, mmap.mmap):
            self._buffer.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _payload(self, row: int, kind: str) -> bytes:
        start, size = self._members[row][kind]
        return self._buffer[start : start + size]


def members_between(url: str, start: int, end: int) -> list[str]:
    """Names of the files in the tar at `url` that have a byte in [start, end), header and padding included.

    Damaged headers are stepped over to the next intact one, so that what lies behind them is found. Raises OSError.
    """
    buffer, offset, found = _map(url), 0, list[str]()
    try:
        while offset < min(end, len(buffer) - BLOCK + 1):
            try:
                name, size = _parse_header(buffer[offset : offset + BLOCK], url, offset)
            except CorruptArtifact:
                offset += BLOCK
                continue
            following = offset + BLOCK + size + -size % BLOCK
            if following > start:
                found.append(name)
            offset = following
    finally:
        if isinstance(buffer, mmap.mmap):
            buffer.close()
    return found


_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" * 2
_NO_TIME = b"0" * 11 + b"\0"
_REGULAR = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
_CONSTANT_SUM = sum(_REGULAR) + 8 * ord(" ")


def _tar_header(name: str, size: int) -> bytes:
    """One POSIX ustar header block: mode 0644, owner 0, time 0."""
    encoded, (fields, known) = name.encode("ascii"), _fields_of_size(size)
    assert len(encoded) <= 100, f"{name} does not fit a ustar header"
    checksum = b"%06o\0 " % (known + sum(encoded))
    return b"".join((encoded.ljust(100, b"\0"), fields, checksum, _REGULAR))


@lru_cache(maxsize=4096)
def _fields_of_size(size: int) -> tuple[bytes, int]:
    """What stands between name and checksum, and the sum of all but the name; few sizes are met often, as captions'."""
    digits = b"%011o" % size
    assert len(digits) == 11, f"{size} bytes do not fit a ustar header"
    fields = b"".join((_MODE_AND_OWNER, digits, b"\0", _NO_TIME))
    return fields, _CONSTANT_SUM + sum(fields)


def _map(url: str) -> bytes | mmap.mmap:
    if not storage.is_local(url):
        return storage.read_bytes(url)
    with storage.local_path(url).open("rb") as file:
        is_empty = not file.seek(0, 2)
        return b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _samples(buffer: bytes | mmap.mmap, url: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {"image" | "json" | "txt": (start, size)}) of each sample, in the order of the archive."""
    known: set[str] = set()
    groups = itertools.groupby(_members(buffer, url), key=lambda member: member[1].partition(".")[0])
    for key, members in groups:
        found: dict[str, tuple[int, int]] = {}
        offset = 0
        for offset, name, size in members:
            extension = name.partition(".")[2].lower()
            kind = "image" if extension in _IMAGE_EXTENSIONS else extension
            if kind in found or key in known:
                raise _corrupt(url, offset, f"sample {key} has a second {extension}, or lies in two places")
            found[kind] = (offset + BLOCK, size)
        if missing := {"image", "json", "txt"} - set(found):
            raise _corrupt(url, offset, f"sample {key} has no {' and no '.join(sorted(missing))}")
        known.add(key)
        yield key, found


def _members(buffer: bytes | mmap.mmap, url: str) -> Iterator[tuple[int, str, int]]:
    """(offset of the header, name, size) of each file up to the end of the archive, which must be there."""
    offset = 0
    while any(block := buffer[offset : offset + BLOCK]):
        name, size = _parse_header(block, url, offset)
        following = offset + BLOCK + size + -size % BLOCK
        if following > len(buffer):
            raise _corrupt(url, offset, f"{name} has {size} bytes, which the file ends before")
        yield offset, name, size
        offset = following
    tail = buffer[offset:]
    if len(tail) < 2 * BLOCK or any(tail):
        raise _corrupt(url, offset, "the end of the archive is missing: the file was cut or overwritten")


def _parse_header(block: bytes, url: str, offset: int) -> tuple[str, int]:
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        is_header = int(block[148:156].rstrip(b"\0 "), 8) == checksum and block[156:157] in b"0\0"
        name, size = block[:100].rstrip(b"\0").decode("ascii"), int(block[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        is_header = False
    if not is_header or len(block) < BLOCK:
        raise _corrupt(url, offset, "there is no intact header of a file")
    return name, size


def _corrupt(url: str, offset: int, problem: str) -> CorruptArtifact:
    return CorruptArtifact(f"{url}, byte {offset}: {problem}")
