"""What Pillow does not tell of a PNG: whether its samples have 16 bits, and whether all of its rows are there."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from data.errors import SampleError

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_INTERLACED = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
"""First column, first row, and steps of both, of Adam7's passes."""
_CHUNK = 1 << 16


def is_deep(payload: bytes) -> bool:
    """Whether samples have other than 8 bits; Pillow shows a 16-bit RGB PNG as one of 8 bits."""
    return _header(payload)[2] != 8


def check(payload: bytes, image: Image.Image) -> None:
    """Returns when the decoded `image` has its palette and all of its rows. Raises SampleError `corrupt_image`, `truncated`.

    Where the packed pixels end too early, though in good order, Pillow leaves the rest zero. So only a picture whose last
    row is all zeros is unpacked a second time, to count its bytes; and an interlaced one.
    """
    if image.mode == "P" and image.palette is None:
        raise SampleError("corrupt_image", "the picture's palette is missing")
    width, height, depth, colour, interlaced = _header(payload)
    if not interlaced and any(image.crop((0, height - 1, width, height)).tobytes()):
        return
    passes = _INTERLACED if interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for left, top, across, down in passes:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        wanted += rows * (1 + (columns * _SAMPLES[colour] * depth + 7) // 8) if columns > 0 else 0
    if not _unpacks_to(payload, wanted):
        raise SampleError(
            "truncated", f"the picture has fewer rows than the {height} that its header announces"
        )


def _header(payload: bytes) -> tuple[int, int, int, int, int]:
    """Width, height, bits of a sample, colour type, interlacing."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", payload, 16)
    return width, height, depth, colour, interlaced


def _unpacks_to(payload: bytes, wanted: int) -> bool:
    """Whether the pixels unpack to as many bytes, at least; stops there."""
    unpacker, found = zlib.decompressobj(), 0
    try:
        for packed in _pixel_chunks(payload):
            while packed and found < wanted:
                found += len(unpacker.decompress(packed, _CHUNK))
                packed = unpacker.unconsumed_tail
        found += len(unpacker.flush()) if found < wanted else 0
    except zlib.error:
        return False
    return found >= wanted


def _pixel_chunks(payload: bytes) -> Iterator[bytes]:
    at = 8
    while at + 8 <= len(payload):
        (length,) = struct.unpack_from(">I", payload, at)
        if payload[at + 4 : at + 8] == b"IDAT":
            yield payload[at + 8 : at + 8 + length]
        at += 12 + length
