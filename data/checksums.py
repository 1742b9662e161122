"""What identifies a file's bytes, and what tells where they changed: SHA-256 of all, CRC-32 of each MiB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from isal import isal_zlib

from data import storage

BLOCK = 1 << 20
"""Bytes that one CRC-32 covers; the last block may be shorter."""


class Checksum:
    """Running digests of bytes as they are read or written."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._crcs: list[int] = []

    def update(self, payload: bytes | bytearray | memoryview) -> None:
        """Adds the bytes that follow."""
        self._sha256.update(payload)
        rest = memoryview(payload)
        while len(rest):
            begun = self.bytes % BLOCK
            part, rest = rest[: BLOCK - begun], rest[BLOCK - begun :]
            self._crcs.append(isal_zlib.crc32(part, self._crcs.pop() if begun else 0))
            self.bytes += len(part)

    @property
    def sha256(self) -> str:
        """Hex digest of all bytes so far."""
        return self._sha256.hexdigest()

    @property
    def blocks(self) -> str:
        """CRC-32 of each successive MiB, 8 hex digits each; empty for no bytes."""
        return "".join(f"{crc:08x}" for crc in self._crcs)


def checksum(payload: bytes) -> Checksum:
    """The checksum of bytes in memory."""
    found = Checksum()
    found.update(payload)
    return found


def checksum_of(url: str) -> Checksum:
    """The checksum of the file at `url`, read once in chunks. Raises FileNotFoundError and other OSErrors."""
    found = Checksum()
    with storage.open_read(url) as stream:
        while chunk := stream.read(BLOCK):
            found.update(chunk)
    return found


def changed_ranges(recorded: str, found: Checksum) -> list[tuple[int, int]]:
    """[first byte, byte behind the last) of each run of blocks of `found` that are not as `recorded`, in order.

    `recorded` is what `blocks` gave then. Bytes that the file had and has no more are in no range.
    """
    now, ranges = found.blocks, list[tuple[int, int]]()
    for start in range(0, found.bytes, BLOCK):
        at = start // BLOCK * 8
        if recorded[at : at + 8] == now[at : at + 8]:
            continue
        end = min(start + BLOCK, found.bytes)
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, end))
    return ranges


def flipped_bits(recorded: int, found: int, size: int) -> Iterator[tuple[int, int]]:
    """(byte, mask) of the one bit that, flipped in a block of `size` bytes, turns its CRC-32 `recorded` into `found`.

    At most one pair. A CRC is linear: equal CRCs differ by a function of the flipped bit's distance from the end, which
    is undone here byte by byte. Damage to several bits rarely looks like that of one; only the SHA-256 tells for sure.
    """
    register = recorded ^ found
    for at in range(size - 1, -1, -1):
        if register in _ONE_BIT:
            yield at, _ONE_BIT[register]
        index = _BY_TOP_BYTE[register >> 24]
        register = ((register ^ _TABLE[index]) << 8) & 0xFFFFFFFF | index


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)  # CRC-32's polynomial, bits reversed
    return value


_TABLE = [_entry(value) for value in range(256)]
_BY_TOP_BYTE = {entry >> 24: value for value, entry in enumerate(_TABLE)}
_ONE_BIT = {_TABLE[1 << bit]: 1 << bit for bit in range(8)}
