"""From the bytes of any picture to the bytes of a training picture: admit by the header, decode, flatten, resize, encode.

What happens to unusual pictures, as rules:

    name of the file     never believed: the format is read from the first bytes
    EXIF orientation     applied
    alpha, transparency  composited on white, before resizing
    palette, gray, CMYK  to RGB by Pillow's conversion; an embedded colour profile is not applied
    16-bit gray          v / 257, rounded, so that 65535 becomes 255; wider integers are clipped to 16 bits first
    16-bit RGB           the high byte of each sample
    animation, pages     the first frame
    float, Lab, HSV      refused as `unsupported_mode`
"""

from __future__ import annotations

import io
import json
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.Image import Resampling, Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from pydantic import Field

from data.config import Config
from data.errors import SampleError

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
_PNG_DEPTH_AT = 24
"""Offset of the bit depth in IHDR; Pillow shows a 16-bit RGB PNG as 8-bit RGB and does not tell."""
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_STORED_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_FLAT_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the stored pixels upright; 5 to 8 exchange width and height."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
)
_FILTERS_LOCK = threading.Lock()


class ImageRules(Config):
    """Which pictures are taken and what becomes of them."""

    image_size: int = Field(default=256, ge=8, le=4096, description="pixels of the side that `resize` fixes")
    resize: Literal["center_crop", "border", "keep_ratio", "no"] = Field(
        default="center_crop",
        description="center_crop: shortest side to image_size, middle square; border: longest side to image_size, "
        "white up to a square; keep_ratio: shortest side to image_size; no: as it came",
    )
    encode_format: Literal["jpg", "png", "webp"] = Field(
        default="jpg", description="format of the stored picture"
    )
    encode_quality: int = Field(default=95, ge=1, le=100, description="quality of jpg and webp; png has none")
    max_pixels: int = Field(
        default=89_478_485, ge=1, description="width x height that the header may announce"
    )
    max_bytes: int = Field(default=100_000_000, ge=1, description="bytes of the original file")
    min_size: int = Field(default=0, ge=0, description="filter: pixels of the shorter side of the original")
    max_aspect_ratio: float = Field(
        default=20.0, ge=1, description="filter: longer over shorter side of the original"
    )


@dataclass(frozen=True, slots=True)
class Header:
    """What the header announces; `width` and `height` are those of the stored pixels, before any orientation."""

    format: str
    mode: str
    width: int
    height: int
    animated: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture ready to be stored; sizes are those of the upright picture."""

    payload: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str | None
    """The main EXIF directory as a JSON object of strings."""
    reencoded: bool
    """False when `payload` is the original, byte for byte."""


def admit(payload: bytes, rules: ImageRules) -> Header:
    """The header of an acceptable picture; no pixel is decoded.

    Raises SampleError: `empty_file`, `too_many_bytes`, `html`, `not_an_image`, `corrupt_image`, `truncated`,
    `too_many_pixels`, and, as filters, `too_small` and `aspect_ratio`.
    """
    return _admit(payload, rules)[1]


def prepare(payload: bytes, rules: ImageRules) -> Prepared:
    """The picture as `rules` want it stored, upright RGB; equal input gives equal bytes.

    An original that already has the format, size, mode and orientation is decoded once, to know that it is whole, and
    passes through unchanged. Raises SampleError as `admit` does, and `truncated`, `corrupt_image` or
    `unsupported_mode` when the pixels cannot be had.
    """
    image, header = _admit(payload, rules)
    if header.format == "JPEG":
        image.draft(None, _draft_size(header, rules))
    _load(image)
    exif, orientation = _exif(image)
    turned = orientation >= 5
    original = (header.height, header.width) if turned else (header.width, header.height)
    size = _target_size(original, rules)
    stored = (rules.image_size, rules.image_size) if rules.resize == "border" else size
    if orientation == 1 and stored == original and _is_stored_form(payload, image, header, rules):
        return Prepared(payload, rules.encode_format, *stored, *original, exif, reencoded=False)
    width, height = size
    resized = _resize(_flatten(image), (height, width) if turned else size, rules)
    encoded = _encode(_pad(_upright(resized, orientation), rules), rules)
    return Prepared(encoded, rules.encode_format, *stored, *original, exif, reencoded=True)


def decode(payload: bytes) -> np.ndarray:
    """The upright picture as a fresh uint8 array (H, W, 3), 0 to 255. Raises SampleError as `prepare` does."""
    image = _open(payload)
    _load(image)
    return np.array(_upright(_flatten(image), _exif(image)[1]))


def _admit(payload: bytes, rules: ImageRules) -> tuple[ImageFile.ImageFile, Header]:
    if len(payload) > rules.max_bytes:
        raise SampleError("too_many_bytes", f"the file is larger than {rules.max_bytes} bytes")
    image = _open(payload)
    width, height = image.size
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
    with _sample_errors(), _no_warnings():
        animated = bool(getattr(image, "is_animated", False))
    return image, Header(str(image.format), image.mode, width, height, animated)


def _open(payload: bytes) -> ImageFile.ImageFile:
    """The picture with its header read. Unlike `Image.open`, consults no process-wide pixel limit and warns of none."""
    if not payload:
        raise SampleError("empty_file", "the file has no bytes")
    name = _sniff(payload)
    if name is None:
        if payload[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_HTML):
            raise SampleError("html", "the file is a web page, not a picture")
        raise SampleError("not_an_image", f"the first bytes are not those of {', '.join(_READERS)}")
    with _sample_errors(), _no_warnings():
        return _READERS[name](io.BytesIO(payload))


def _sniff(payload: bytes) -> str | None:
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC if payload.startswith(magic)), None)


def _load(image: ImageFile.ImageFile) -> None:
    # a TIFF's directories are read again while decoding, with warnings; one at a time is no loss for so rare a format
    quiet = _no_warnings() if image.format == "TIFF" else nullcontext()
    with _sample_errors(), quiet:
        image.load()


@contextmanager
def _sample_errors() -> Iterator[None]:
    """Turns what Pillow raises for bad bytes into SampleError; running out of memory stays what it is."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise SampleError("too_many_pixels", "the header announces far too many pixels") from error
    except _DECODE_ERRORS as error:
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt_image"
        detail = error if isinstance(error, OSError | SyntaxError) else type(error).__name__
        raise SampleError(reason, f"the picture cannot be decoded: {detail}") from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silences Pillow's warnings on odd metadata. The interpreter's filters are shared by all threads, hence the lock."""
    with _FILTERS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _exif(image: ImageFile.ImageFile) -> tuple[str | None, int]:
    """(EXIF as JSON or None, orientation 1 to 8). Asks after decoding, since a PNG may carry EXIF behind its pixels."""
    try:
        with _sample_errors(), _no_warnings():
            entries = dict(image.getexif())
    except SampleError:
        return None, 1
    texts = {
        ExifTags.TAGS.get(tag, str(tag)): str(value)
        for tag, value in sorted(entries.items())
        if not isinstance(value, bytes)
    }
    orientation = entries.get(ExifTags.Base.Orientation, 1)
    return json.dumps(texts) if texts else None, orientation if orientation in _UPRIGHT else 1


def _is_stored_form(payload: bytes, image: Image.Image, header: Header, rules: ImageRules) -> bool:
    """Whether the original already is one opaque 8-bit RGB picture in the format to store."""
    if header.format != _STORED_FORMAT[rules.encode_format] or header.animated or image.mode != "RGB":
        return False
    is_deep_png = header.format == "PNG" and payload[_PNG_DEPTH_AT] != 8
    return not is_deep_png and "transparency" not in image.info


def _draft_size(header: Header, rules: ImageRules) -> tuple[int, int]:
    """At least twice the target, so that the resampler sets the quality and the decoder only saves work."""
    width, height = _target_size((header.width, header.height), rules)
    if rules.resize == "center_crop":
        width, height = _scaled(
            (header.width, header.height), rules.image_size, min(header.width, header.height)
        )
    return 2 * width, 2 * height


def _target_size(size: tuple[int, int], rules: ImageRules) -> tuple[int, int]:
    """(width, height) after resizing, before any border."""
    match rules.resize:
        case "no":
            return size
        case "center_crop":
            return rules.image_size, rules.image_size
        case "keep_ratio":
            return _scaled(size, rules.image_size, min(size))
        case "border":
            return _scaled(size, rules.image_size, max(size))


def _scaled(size: tuple[int, int], target: int, side: int) -> tuple[int, int]:
    return max(1, round(size[0] * target / side)), max(1, round(size[1] * target / side))


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, 8 bits, opaque."""
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    with _sample_errors():
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        if image.mode in _FLAT_MODES:
            return image.convert("RGB")
    raise SampleError("unsupported_mode", f"pixels of mode {image.mode} have no stated conversion to RGB")


def _resize(image: Image.Image, size: tuple[int, int], rules: ImageRules) -> Image.Image:
    if image.size == size:
        return image
    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    if rules.resize == "center_crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    return image.resize(size, Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _pad(image: Image.Image, rules: ImageRules) -> Image.Image:
    side = rules.image_size
    if rules.resize != "border" or image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _encode(image: Image.Image, rules: ImageRules) -> bytes:
    image.info = {}  # Pillow would write what the original carried: profile, resolution, comments
    buffer = io.BytesIO()
    options = {} if rules.encode_format == "png" else {"quality": rules.encode_quality}
    image.save(buffer, _STORED_FORMAT[rules.encode_format], **options)
    return buffer.getvalue()
