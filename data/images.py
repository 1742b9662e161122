"""From the bytes of any picture to the bytes of a training picture: admit by the header, decode, flatten, resize, encode.

What happens to unusual pictures, as rules:

    name of the file     never believed: the format is read from the first bytes
    EXIF orientation     applied
    alpha, transparency  composited on white, before resizing
    palette, gray, CMYK  to RGB by Pillow's conversion
    ICC profile          not applied, be it a camera's of wide gamut or a press's: the numbers are what is learnt from, as
                         with img2dataset; it stays in an original that passes through, and in no other picture
    16-bit gray          v / 257, rounded, so that 65535 becomes 255; wider integers are clipped to 16 bits first
    16-bit RGB           the high byte of each sample
    animation, pages     the first frame
    float, Lab, HSV      refused as `unsupported_mode`
    damaged JPEG         refused whatever libjpeg would make of it; bytes behind its end are ignored
"""

from __future__ import annotations

import io
import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

from data import jpegs, pngs
from data.admission import Header, no_warnings, open_admitted, open_header, read_exif, sample_errors
from data.errors import SampleError
from data.geometry import Placement, place
from data.image_rules import ImageRules
from data.resampling import resample

__all__ = ["Header", "ImageRules", "Prepared", "admit", "decode", "prepare"]

_STORED_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_FLAT_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_HEAD_ROOM = 2
"""A JPEG is decoded at least this many times as large as it is to become, so that the resampler sets the quality."""

_STRIP_PIXELS = 1 << 20


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
    return open_admitted(payload, rules)[1]


def prepare(payload: bytes, rules: ImageRules) -> Prepared:
    """The picture as `rules` want it stored, upright RGB; equal input gives equal bytes.

    One rule: an original that already is what would be stored (format, size, 8-bit RGB, upright, one frame) passes
    through unchanged, once all of it was read to know that it is whole; every other is decoded, resized and encoded.
    Raises SampleError as `admit` does, and `truncated`, `corrupt_image` or `unsupported_mode` when the pixels cannot be had.
    """
    image, header = open_admitted(payload, rules)
    is_plain = image is None or _read_whole_unless_plain(image, payload)
    exif, orientation = (None, 1) if image is None else read_exif(image)
    turned = orientation >= 5
    original = (header.height, header.width) if turned else (header.width, header.height)
    upright = place(original, rules)
    if orientation == 1 and upright.canvas == original and _is_stored_form(payload, image, header, rules):
        if is_plain:
            jpegs.check(payload)
        return Prepared(payload, rules.encode_format, *original, *original, exif, reencoded=False)
    placement = upright.turned() if turned else upright
    taken = _taken_from_jpeg(payload, placement) if image is None or is_plain else _taken(image, placement)
    encoded = _encode(_on_canvas(_upright(taken, orientation), upright.canvas), rules)
    return Prepared(encoded, rules.encode_format, *upright.canvas, *original, exif, reencoded=True)


def decode(payload: bytes) -> np.ndarray:
    """The upright picture as a fresh uint8 array (H, W, 3), 0 to 255. Raises SampleError as `prepare` does."""
    if jpegs.bare_header(payload):
        return np.require(jpegs.pixels(payload), requirements=("C", "W"))
    image = open_header(payload)
    pixels = jpegs.pixels(payload) if _read_whole_unless_plain(image, payload) else _flatten(image)
    return np.require(_upright(pixels, read_exif(image)[1]), requirements=("C", "W"))


def _read_whole_unless_plain(image: ImageFile.ImageFile, payload: bytes) -> bool:
    """Whether the picture is a JPEG that needs no Pillow; if not, Pillow decodes it now."""
    if "progressive" in image.info:
        jpegs.refuse_many_scans(payload)
    if image.format == "JPEG" and image.mode in ("RGB", "L") and jpegs.is_plain(payload):
        return True
    if image.mode == "CMYK" and image.format == "JPEG":
        jpegs.check(payload)
    # a TIFF's directories are read again while decoding, with warnings; one at a time is no loss for so rare a format
    quiet = no_warnings() if image.format == "TIFF" else nullcontext()
    with sample_errors(), quiet:
        image.load()
    if image.format == "PNG":
        pngs.check(payload, image)
    return False


def _is_stored_form(payload: bytes, image: Image.Image | None, header: Header, rules: ImageRules) -> bool:
    """Whether the original already is one opaque 8-bit RGB picture in the format to store."""
    mode = header.mode if image is None else image.mode  # decoding may have changed it
    if header.format != _STORED_FORMAT[rules.encode_format] or header.animated or mode != "RGB":
        return False
    is_deep = header.format == "PNG" and pngs.is_deep(payload)
    return not is_deep and (image is None or "transparency" not in image.info)


def _taken_from_jpeg(payload: bytes, place: Placement) -> np.ndarray:
    """The placed part of a plain JPEG, decoded no larger than its new size asks for."""
    room = min(place.width / place.size[0], place.height / place.size[1]) / _HEAD_ROOM
    reduction = max(factor for factor in jpegs.REDUCTIONS if factor <= max(1.0, room))
    left, top = place.left / reduction, place.top / reduction
    width, height = place.width / reduction, place.height / reduction
    column, row = round(left), round(top)
    part = jpegs.pixels(payload, reduction)[row : math.ceil(top + height), column : math.ceil(left + width)]
    return resample(part, (width, height), place.size, (left - column, top - row))


def _taken(image: Image.Image, place: Placement) -> np.ndarray:
    """The placed part of a picture that Pillow has decoded."""
    box = (place.left, place.top, place.left + place.width, place.top + place.height)
    part = _flatten(image if box == (0, 0, *image.size) else image.crop(box))
    return resample(part, (place.width, place.height), place.size)


def _flatten(image: Image.Image) -> np.ndarray:
    """RGB, 8 bits, opaque: uint8 (H, W, 3), perhaps read-only. Strip by strip, or a large picture would be held thrice."""
    (width, height), rows = image.size, max(1, _STRIP_PIXELS // image.width)
    if height <= rows:
        return _flattened(image)
    whole = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        whole[top : top + rows] = _flattened(image.crop((0, top, width, min(top + rows, height))))
    return whole


def _flattened(image: Image.Image) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=-1)
    with sample_errors():
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image.convert("RGBA"))
        if image.mode in _FLAT_MODES or image.mode == "RGBA":
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    raise SampleError("unsupported_mode", f"pixels of mode {image.mode} have no stated conversion to RGB")


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of the pixels as EXIF `orientation` means them; 5 to 8 exchange width and height."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flipped_down, flipped_across = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flipped_down else 1, :: -1 if flipped_across else 1]


def _on_canvas(pixels: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """The pixels in the middle of a white canvas (width, height)."""
    height, width, _ = pixels.shape
    if (width, height) == canvas:
        return pixels
    whole = np.full((canvas[1], canvas[0], 3), 255, np.uint8)
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    whole[top : top + height, left : left + width] = pixels
    return whole


def _encode(pixels: np.ndarray, rules: ImageRules) -> bytes:
    pixels = np.ascontiguousarray(pixels)
    if rules.encode_format == "jpg":
        return jpegs.encode(pixels, rules.encode_quality)
    buffer = io.BytesIO()
    options = {} if rules.encode_format == "png" else {"quality": rules.encode_quality}
    Image.fromarray(pixels).save(buffer, _STORED_FORMAT[rules.encode_format], **options)
    return buffer.getvalue()
