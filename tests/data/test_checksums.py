"""Checksums: equal whatever the pieces, and precise about where bytes changed."""

from __future__ import annotations

import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.checksums import BLOCK, Checksum, changed_ranges, checksum, flipped_bits

PAYLOAD = bytes(range(256)) * (2 * BLOCK // 256) + b"the last block is short"


@pytest.mark.parametrize("size", [100_003, BLOCK - 1, BLOCK, BLOCK + 1, len(PAYLOAD)])
def test_the_checksum_does_not_depend_on_the_pieces(size: int) -> None:
    found = Checksum()
    for start in range(0, len(PAYLOAD), size):
        found.update(PAYLOAD[start : start + size])
    assert found.bytes == len(PAYLOAD)
    assert found.sha256 == hashlib.sha256(PAYLOAD).hexdigest()
    crcs = [zlib.crc32(PAYLOAD[start : start + BLOCK]) for start in range(0, len(PAYLOAD), BLOCK)]
    assert found.blocks == "".join(f"{crc:08x}" for crc in crcs)


def test_no_bytes_have_no_blocks() -> None:
    assert (checksum(b"").bytes, checksum(b"").blocks) == (0, "")


@pytest.mark.parametrize(
    ("places", "ranges"),
    [
        ([], []),
        ([0], [(0, BLOCK)]),
        ([BLOCK - 1, BLOCK], [(0, 2 * BLOCK)]),
        ([5, 2 * BLOCK], [(0, BLOCK), (2 * BLOCK, len(PAYLOAD))]),
    ],
)
def test_changed_bytes_are_found_in_their_blocks(places: list[int], ranges: list[tuple[int, int]]) -> None:
    changed = bytearray(PAYLOAD)
    for place in places:
        changed[place] ^= 0xFF
    assert changed_ranges(checksum(PAYLOAD).blocks, checksum(bytes(changed))) == ranges


@given(st.binary(min_size=1, max_size=300), st.data())
def test_a_flipped_bit_is_found_from_two_crcs_alone(payload: bytes, data: st.DataObject) -> None:
    at, bit = data.draw(st.integers(0, len(payload) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(payload)
    changed[at] ^= 1 << bit
    assert list(flipped_bits(zlib.crc32(payload), zlib.crc32(changed), len(payload))) == [(at, 1 << bit)]


def test_equal_crcs_have_no_flipped_bit() -> None:
    assert list(flipped_bits(7, 7, 1000)) == []


def test_two_flipped_bits_are_not_taken_for_one() -> None:
    changed = bytearray(PAYLOAD[:BLOCK])
    changed[10] ^= 1
    changed[70_000] ^= 8
    assert list(flipped_bits(zlib.crc32(PAYLOAD[:BLOCK]), zlib.crc32(changed), BLOCK)) == []
