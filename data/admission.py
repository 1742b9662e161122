"""The first look at a picture: its format by the first bytes, its header, its EXIF; no pixel is decoded here.

The name of the file is never believed. Unlike `Image.open`, no process-wide pixel limit is consulted and no warning is
given: the caller's rules decide, and what is wrong is a SampleError.
"""

from __future__ import annotations

import io
import json
import logging
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data import jpegs
from data.errors import SampleError
from data.image_rules import ImageRules

_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    struct.error,
)
"""What Pillow's readers were seen to raise, or may, on bytes that lie."""
_FILTERS_LOCK = threading.Lock()
logging.getLogger("PIL").addHandler(logging.NullHandler())  # or what it finds wrong goes to stderr as well


@dataclass(frozen=True, slots=True)
class Header:
    """What the header announces; `width` and `height` are those of the stored pixels, before any orientation."""

    format: str
    mode: str
    width: int
    height: int
    animated: bool


def open_admitted(payload: bytes, rules: ImageRules) -> tuple[ImageFile.ImageFile | None, Header]:
    """The picture, not yet decoded, and its header; None for a JPEG that needs no Pillow (`jpegs.bare_header`).

    Raises SampleError as `data.images.admit` says.
    """
    if len(payload) > rules.max_bytes:
        raise SampleError("too_many_bytes", f"the file is larger than {rules.max_bytes} bytes")
    if bare := jpegs.bare_header(payload):
        header = Header("JPEG", *bare, animated=False)
        _check_sides(header.width, header.height, rules)
        return None, header
    image = open_header(payload)
    _check_sides(*image.size, rules)
    return image, Header(str(image.format), image.mode, *image.size, _is_animated(image))


def _check_sides(width: int, height: int, rules: ImageRules) -> None:
    if width * height > rules.max_pixels:
        raise SampleError(
            "too_many_pixels", f"the header announces {width}x{height}; {rules.max_pixels} pixels are allowed"
        )
    if min(width, height) < rules.min_size:
        raise SampleError(
            "too_small", f"{width}x{height} has a side below {rules.min_size} pixels", filtered=True
        )
    if max(width, height) > rules.max_aspect_ratio * min(width, height):
        raise SampleError(
            "aspect_ratio", f"{width}x{height} is longer than {rules.max_aspect_ratio:g} to 1", filtered=True
        )


def open_header(payload: bytes) -> ImageFile.ImageFile:
    """The picture with its header read, whatever its size. Raises SampleError as `data.images.decode` does."""
    if not payload:
        raise SampleError("empty_file", "the file has no bytes")
    name = _sniff(payload)
    if name is None:
        if payload[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
            raise SampleError("html", "the file is a web page, not a picture")
        raise SampleError("not_an_image", f"the first bytes are not those of {', '.join(_READERS)}")
    with sample_errors(), no_warnings():
        image = _READERS[name](io.BytesIO(payload))
    if min(image.size) < 1:
        raise SampleError("corrupt_image", f"the header announces {image.width}x{image.height} pixels")
    return image


def read_exif(image: ImageFile.ImageFile) -> tuple[str | None, int]:
    """(EXIF as JSON or None, orientation 1 to 8). A PNG may carry EXIF behind its pixels: ask after decoding."""
    if image.format == "JPEG" and "exif" not in image.info:
        return None, 1
    try:
        with sample_errors(), no_warnings():
            entries = dict(image.getexif())
    except SampleError:
        return None, 1
    texts = {
        ExifTags.TAGS.get(tag, str(tag)): str(value)
        for tag, value in sorted(entries.items())
        if not isinstance(value, bytes)
    }
    orientation = entries.get(ExifTags.Base.Orientation, 1)
    return json.dumps(texts) if texts else None, orientation if orientation in range(1, 9) else 1


@contextmanager
def sample_errors() -> Iterator[None]:
    """Turns what decoders raise for bad bytes into SampleError; running out of memory stays what it is."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", "the header announces far too many pixels") from error
    except _DECODE_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt_image"
        detail = error if isinstance(error, OSError | SyntaxError) else type(error).__name__
        raise SampleError(reason, f"the picture cannot be decoded: {detail}") from error


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silences Pillow's warnings on odd metadata. The interpreter's filters are shared by all threads, hence the lock."""
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _sniff(payload: bytes) -> str | None:
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if payload.startswith(magic)), None)


def _is_animated(image: ImageFile.ImageFile) -> bool:
    if image.format == "JPEG":
        return False
    with sample_errors(), no_warnings():
        return bool(getattr(image, "is_animated", False))
