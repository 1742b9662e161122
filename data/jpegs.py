"""Plain JPEGs at full speed: whole or refused, decoded at a half, a quarter or an eighth where that is enough.

libjpeg goes on after damage and fills what is missing with gray; here its every warning is a failure. The pixels are those
that Pillow gives. Reducing while decoding stops at powers of two: other fractions cost more than the whole picture.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg

from data.errors import SampleError

REDUCTIONS = (1, 2, 4, 8)
_MAX_SCANS = 100
_ERRORS = (ValueError, KeyError)
"""KeyError: colours that simplejpeg has no name for."""
_PROFILE = b"ICC_PROFILE\0"
_START, _SCAN, _END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
_FOR_PILLOW = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0")
"""Notes that Pillow reads: how a picture was held, by EXIF or XMP, and that others follow it in the file."""
_SEGMENT = struct.Struct(">BBHB")
"""0xFF, what the segment is, its length, and its first byte: the bits of a sample where it is a frame's."""
_BASELINE, _FIRST_SCAN = 0xC0, 0xDA
_TABLES_AND_NOTES = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Huffman and quantization tables, restart intervals, comments, and what applications note."""
_MODES = {"YCbCr": "RGB", "RGB": "RGB", "Gray": "L"}


def is_plain(payload: bytes) -> bool:
    """Whether libjpeg-turbo knows the colours and the subsampling of this JPEG and can give RGB of 8 bits."""
    return _header(payload) is not None


def bare_header(payload: bytes) -> tuple[str, int, int] | None:
    """(mode as Pillow names it, width, height) of a plain baseline JPEG of which Pillow would tell no more.

    It has no EXIF, no XMP and no further pictures. The segments are walked up to the first scan; None where one of them is unusual, so that Pillow judges it.
    """
    at, is_baseline = 2, False
    while payload.startswith(_START) and at + _SEGMENT.size <= len(payload):
        mark, kind, length, first = _SEGMENT.unpack_from(payload, at)
        if mark != 0xFF or length < 2:
            return None
        if kind == _FIRST_SCAN:
            return _header(payload) if is_baseline else None
        if kind == _BASELINE and not is_baseline and first == 8:
            is_baseline = True
        elif kind not in _TABLES_AND_NOTES or payload.startswith(_FOR_PILLOW, at + 4):
            return None
        at += 2 + length
    return None


def refuse_many_scans(payload: bytes) -> None:
    """For progressive JPEGs, which cost all of their pixels with every scan, be it of a few bytes. Raises SampleError."""
    if payload.count(_SCAN) > _MAX_SCANS:
        raise SampleError("corrupt_image", f"the picture has more than {_MAX_SCANS} scans")


def check(payload: bytes) -> None:
    """Returns when every bit of the JPEG's scans can be read; the cheapest way to know. Raises as `pixels` does."""
    with _as_sample_errors(payload):
        _decoded(payload, "GRAY", 1, 1, 8)


def size(payload: bytes) -> tuple[int, int]:
    """(width, height) as stored, of a JPEG that `is_plain`."""
    height, width, *_ = simplejpeg.decode_jpeg_header(payload, strict=False)
    return int(width), int(height)


def _header(payload: bytes) -> tuple[str, int, int] | None:
    """(mode, width, height) of a JPEG whose colours and subsampling libjpeg-turbo knows and that has pixels."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload, strict=False)
    except _ERRORS:
        return None
    return (_MODES[colours], int(width), int(height)) if colours in _MODES else None


def pixels(payload: bytes, reduction: int = 1) -> np.ndarray:
    """RGB, uint8 (ceil(H / reduction), ceil(W / reduction), 3), in the stored orientation; `reduction` is 1, 2, 4 or 8.

    Raises SampleError: `truncated` when the end is missing, else `corrupt_image` for anything that libjpeg warns of.
    """
    assert reduction in REDUCTIONS, f"a JPEG cannot be decoded at 1/{reduction}"
    with _as_sample_errors(payload):
        width, height = size(payload)
        rows, columns = math.ceil(height / reduction), math.ceil(width / reduction)
        return _decoded(payload, "RGB", rows, columns, reduction)


def encode(rgb: np.ndarray, quality: int) -> bytes:
    """A baseline JPEG, chroma halved in both directions as Pillow and OpenCV do; `rgb` uint8 (H, W, 3), C order."""
    return simplejpeg.encode_jpeg(rgb, quality, "RGB", "420")


def _decoded(payload: bytes, colours: str, rows: int, columns: int, reduction: int) -> np.ndarray:
    """Strictly, but for a broken colour profile, which is of no use here: the second time its marker is wiped out."""
    try:
        return simplejpeg.decode_jpeg(payload, colours, False, False, rows, columns, reduction)
    except ValueError as error:
        if "ICC" not in str(error):
            raise
    wiped = payload.replace(_PROFILE, bytes(len(_PROFILE)))
    return simplejpeg.decode_jpeg(wiped, colours, False, False, rows, columns, reduction)


@contextmanager
def _as_sample_errors(payload: bytes) -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        cut = payload.rfind(_END) < payload.rfind(_SCAN)
        reason = "truncated" if cut else "corrupt_image"
        raise SampleError(reason, f"the picture cannot be decoded: {error}") from error
