"""Pictures that attack, lie or are merely odd, made by code: each with what must become of it.

`CASES` maps a name to (a function that makes the bytes, `stored` or the reason of the SampleError). Reasons given as a set
are all right: which one it is depends on the version of a decoder. Run as a program it prepares every case under a limit
on memory, prints its name before and a line of JSON after each.
"""

from __future__ import annotations

import gzip
import io
import json
import resource
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

Outcome = str | frozenset[str]
Case = tuple[Callable[[], bytes], Outcome]

STORED = "stored"
BROKEN: Outcome = frozenset({"truncated", "corrupt_image"})
OVERSIZED: Outcome = frozenset({"truncated", "corrupt_image", "too_many_pixels"})
EITHER: Outcome = frozenset({"truncated", "corrupt_image", STORED})
WIDTH, HEIGHT = 96, 64


def photo() -> Image.Image:
    """96 x 64 smooth colours with some noise, so that a JPEG of it has coefficients to damage."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(0).integers(-20, 20, (HEIGHT, WIDTH, 3))
    smooth = np.stack([120 + 90 * np.sin(x / 9), 2.5 * x, 3 * y], -1)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def saved(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    """`photo()` in a mode and a format."""
    buffer = io.BytesIO()
    photo().convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def with_exif(body: bytes) -> bytes:
    """A JPEG whose APP1 holds `body` as its EXIF."""
    return segment_after_soi(saved("JPEG"), 0xE1, b"Exif\0\0" + body)


def oriented(value: int) -> bytes:
    """A JPEG with EXIF orientation `value`, allowed or not."""
    exif = Image.Exif()
    exif[0x0112] = value
    return saved("JPEG", exif=exif)


def segment_after_soi(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """`jpeg` with one more segment at its start."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan's header, which is the last."""
    at = 2
    while True:
        marker, length = jpeg[at + 1], struct.unpack_from(">H", jpeg, at + 2)[0]
        yield marker, at, at + 2 + length
        if marker == 0xDA:
            return
        at += 2 + length


def without(jpeg: bytes, marker: int) -> bytes:
    """`jpeg` less the segments of one kind."""
    for _, start, end in reversed([s for s in segments(jpeg) if s[0] == marker]):
        jpeg = jpeg[:start] + jpeg[end:]
    return jpeg


def scan_start(jpeg: bytes) -> int:
    """Where the entropy-coded bytes of the first scan begin."""
    return next(end for marker, _, end in segments(jpeg) if marker == 0xDA)


def frame(jpeg: bytes, at: int, value: bytes) -> bytes:
    """`jpeg` with bytes of its SOF overwritten: 4 precision, 5 height, 7 width, 9 components, 11 sampling of Y."""
    start = next(start for marker, start, _ in segments(jpeg) if 0xC0 <= marker <= 0xC2)
    return jpeg[: start + at] + value + jpeg[start + at + len(value) :]


def sof(jpeg: bytes, marker: int) -> bytes:
    """`jpeg` with its frame announced as another kind."""
    start = next(start for found, start, _ in segments(jpeg) if 0xC0 <= found <= 0xC2)
    return jpeg[: start + 1] + bytes([marker]) + jpeg[start + 2 :]


def overwritten(payload: bytes, at: int, value: bytes) -> bytes:
    """`payload` with `value` at offset `at`, negative ones from its end."""
    at %= len(payload)
    return payload[:at] + value + payload[at + len(value) :]


def restarts(change: Callable[[bytes], bytes]) -> bytes:
    """A JPEG with restart markers after every block row, the scan changed by `change`."""
    jpeg = saved("JPEG", restart_marker_rows=1)
    at = scan_start(jpeg)
    return jpeg[:at] + change(jpeg[at:-2]) + jpeg[-2:]


def many_scans(count: int) -> bytes:
    """A progressive JPEG of 6000 x 6000 pixels with `count` scans of nearly no bytes."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG", progressive=True)
    jpeg = buffer.getvalue()
    first = next(start for marker, start, _ in segments(jpeg) if marker == 0xDA)
    scan = jpeg[first : jpeg.index(b"\xff\xc4", first)]
    return jpeg[:first] + scan * count + b"\xff\xd9"


def chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its right CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int = WIDTH,
    height: int = HEIGHT,
    depth: int = 8,
    colour: int = 2,
    pixels: bytes | None = None,
    before: bytes = b"",
    interlace: int = 0,
    after: bytes = b"",
) -> bytes:
    """A PNG of those header fields, of black pixels unless `pixels` (filtered rows, not yet compressed) are given."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    if pixels is None:
        pixels = bytes((1 + (width * samples * depth + 7) // 8) * height)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(pixels)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def png_bomb(side: int) -> bytes:
    """A true 1-bit PNG of side x side black pixels, some hundred kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", packed)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """That many megabytes of zeros, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def gif(
    width: int, height: int, frame_size: tuple[int, int] = (1, 1), data: bytes = b"\x02\x02\x44\x01\0"
) -> bytes:
    """A GIF whose screen and only frame have those sizes; the frame's data are of one pixel."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return screen + b"," + struct.pack("<HHHHB", 0, 0, *frame_size, 0) + data + b";"


def bmp(
    width: int, height: int, bits: int = 24, compression: int = 0, palette: bytes = b"", data: bytes = b""
) -> bytes:
    """A BMP with a 40-byte header; 65 x 64 gray-blue pixels' worth of data unless given."""
    data = data or bytes(range(256)) * 100
    offset = 54 + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0
    )
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + palette + data


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of one directory: tag -> (type, count, value or offset)."""
    rows = b"".join(struct.pack("<HHII", tag, *entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", following) + data


def gray_tiff(
    width: int, height: int, offset: int = 0, following: int = 0, **more: tuple[int, int, int]
) -> bytes:
    """An uncompressed gray TIFF of one strip."""
    extra = {int(tag[1:]): entry for tag, entry in more.items()}
    entries = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, width * height % 2**32), **extra,
    }  # fmt: skip
    start = offset or 8 + 2 + 12 * (len(entries) + (273 not in entries)) + 4
    entries.setdefault(273, (4, 1, start))
    return tiff(entries, bytes(64 * 64), following)


def tiff_pages(count: int) -> bytes:
    """A TIFF whose directories form a chain of `count`, each of one pixel."""
    entries = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 1}
    length = 2 + 12 * len(entries) + 4
    pages = bytearray(b"II*\0" + struct.pack("<I", 8))
    for page in range(count):
        following = 8 + (page + 1) * length if page + 1 < count else 0
        rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
        pages += struct.pack("<H", len(entries)) + rows + struct.pack("<I", following)
    return bytes(pages)


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP that announces a canvas of that size around a small picture."""
    inner = saved("WEBP")[12:]
    size = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animation(image_format: str, **options: Any) -> bytes:
    """Two frames."""
    second = photo().rotate(180)
    if image_format == "GIF":
        return saved(image_format, "P", save_all=True, append_images=[second.convert("P")], **options)
    return saved(image_format, save_all=True, append_images=[second], **options)


def deep(mode: str) -> bytes:
    """A PNG of 16 bits per sample: `gray`, `gray_alpha`, `rgb` or `rgba`."""
    colour, samples = {"gray": (0, 1), "gray_alpha": (4, 2), "rgb": (2, 3), "rgba": (6, 4)}[mode]
    row = b"\0" + b"\x80\x01" * samples * WIDTH
    return png(depth=16, colour=colour, pixels=row * HEIGHT)


def zipped() -> bytes:
    """A zip with a picture inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", saved("JPEG"))
    return buffer.getvalue()


def subsampled(kind: str) -> bytes:
    """A JPEG whose colours are as coarse as simplejpeg calls `kind`."""
    return simplejpeg.encode_jpeg(np.asarray(photo()), 85, "RGB", kind)


def random_bytes(count: int, seed: int = 1) -> bytes:
    """Bytes of a seeded generator."""
    return np.random.default_rng(seed).bytes(count)


def cuts(image_format: str, places: list[float], **options: Any) -> dict[str, Case]:
    """The same file ended at each fraction of its length."""
    whole = saved(image_format, **options)
    return {
        f"{image_format} {options or ''} cut at {place:.1%}": (
            lambda p=place: whole[: int(len(whole) * p)],
            BROKEN,
        )
        for place in places
    }


NO_PICTURES: dict[str, Case] = {
    "zero bytes": (lambda: b"", "empty_file"),
    "one byte": (lambda: b"\xff", "not_an_image"),
    "only zeros": (lambda: bytes(5000), "not_an_image"),
    "random bytes": (lambda: random_bytes(5000), "not_an_image"),
    "text": (lambda: b"404 not found\n", "not_an_image"),
    "json": (lambda: b'{"error": "gone"}', "not_an_image"),
    "html": (lambda: b"<!DOCTYPE html><html><body>gone</body></html>", "html"),
    "html behind blank lines": (lambda: b"\r\n\r\n  <HTML><head></head></HTML>", "html"),
    "html behind a byte order mark": (lambda: b"\xef\xbb\xbf<html></html>", "html"),
    "svg": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "not_an_image"),
    "xml": (lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "not_an_image"),
    "pdf": (lambda: b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n", "not_an_image"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n", "not_an_image"),
    "zip": (zipped, "not_an_image"),
    "gzip of a jpeg": (lambda: gzip.compress(saved("JPEG"), mtime=0), "not_an_image"),
    "ico": (lambda: saved("ICO"), "not_an_image"),
    "psd": (lambda: b"8BPS\0\x01" + bytes(40), "not_an_image"),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(90), "not_an_image"),
    "jpeg xl": (lambda: b"\xff\x0a" + random_bytes(90), "not_an_image"),
    "heic": (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(90), "not_an_image"),
    "avif": (lambda: b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(90), "not_an_image"),
    "mp4": (lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(90), "not_an_image"),
    "wav": (lambda: b"RIFF\x24\0\0\0WAVEfmt " + bytes(90), "not_an_image"),
    "big tiff": (lambda: b"II+\0\x08\0\0\0" + bytes(90), "not_an_image"),
    "netpbm": (lambda: b"P6 1 1 255\n\0\0\0", "not_an_image"),
    "script": (lambda: b"#!/bin/sh\nrm -rf /\n", "not_an_image"),
}  # fmt: skip

JPEGS: dict[str, Case] = {
    **cuts("JPEG", [0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99]),
    **cuts("JPEG", [0.3, 0.6, 0.95], progressive=True),
    "jpeg without its last two bytes": (lambda: saved("JPEG")[:-2], "truncated"),
    "jpeg without its last byte": (lambda: saved("JPEG")[:-1], "truncated"),
    "jpeg's magic, then noise": (lambda: b"\xff\xd8\xff" + random_bytes(5000), BROKEN),
    "jpeg's magic, then zeros": (lambda: b"\xff\xd8\xff" + bytes(5000), BROKEN),
    "jpeg's magic, then ones": (lambda: b"\xff\xd8" + b"\xff" * 5000, BROKEN),
    "jpeg of begin and end alone": (lambda: b"\xff\xd8\xff\xd9", BROKEN),
    "jpeg whose second half is zeros": (lambda: (j := saved("JPEG"))[: len(j) // 2] + bytes(len(j) // 2), BROKEN),
    "jpeg whose middle is zeros": (lambda: overwritten(saved("JPEG"), 2000, bytes(200)), BROKEN),
    "jpeg whose middle is noise": (lambda: overwritten(saved("JPEG"), 2000, random_bytes(300)), BROKEN),
    "jpeg that ends in its middle": (lambda: overwritten(saved("JPEG"), 2000, b"\xff\xd9"), BROKEN),
    "jpeg with a hole": (lambda: (j := saved("JPEG"))[:1500] + j[1900:], BROKEN),
    "jpeg with a stray marker": (lambda: overwritten(saved("JPEG"), 2000, b"\xff\xd3"), BROKEN),
    "jpeg behind garbage": (lambda: b"\0\x01garbage" + saved("JPEG"), "not_an_image"),
    "jpeg before garbage": (lambda: saved("JPEG") + random_bytes(5000), STORED),
    "two jpegs in one file": (lambda: saved("JPEG") * 2, STORED),
    "jpeg, then a cut jpeg": (lambda: saved("JPEG") + saved("JPEG")[:900], STORED),
    "jpeg with restart markers": (lambda: restarts(lambda scan: scan), STORED),
    "jpeg with restart markers lost": (lambda: restarts(lambda scan: scan.replace(b"\xff\xd1", b"")), BROKEN),
    "jpeg with restart markers exchanged": (
        lambda: restarts(lambda s: s.replace(b"\xff\xd0", b"\xff\xd5").replace(b"\xff\xd1", b"\xff\xd0")), BROKEN),
    "jpeg without quantisation": (lambda: without(saved("JPEG"), 0xDB), BROKEN),
    "jpeg with the default codes left out": (lambda: without(saved("JPEG"), 0xC4), STORED),
    "jpeg without a frame": (lambda: without(saved("JPEG"), 0xC0), BROKEN),
    "jpeg with impossible codes": (
        lambda: segment_after_soi(without(saved("JPEG"), 0xC4), 0xC4, b"\0" + b"\xff" * 16 + bytes(4096)), BROKEN),
    "jpeg of height 0": (lambda: frame(saved("JPEG"), 5, b"\0\0"), BROKEN),
    "jpeg of width 0": (lambda: frame(saved("JPEG"), 7, b"\0\0"), BROKEN),
    "jpeg that is taller than its data": (lambda: frame(saved("JPEG"), 5, b"\x04\0"), BROKEN),
    "jpeg that is shorter than its data": (lambda: frame(saved("JPEG"), 5, b"\0\x20"), BROKEN),
    "jpeg of 65500 x 65500": (lambda: frame(saved("JPEG"), 5, b"\xff\xdc\xff\xdc"), "too_many_pixels"),
    "jpeg of 9000 x 9000 with data for 96 x 64": (lambda: frame(saved("JPEG"), 5, b"\x23\x28\x23\x28"), BROKEN),
    "jpeg of no component": (lambda: frame(saved("JPEG"), 9, b"\0"), BROKEN),
    "jpeg of nine components": (lambda: frame(saved("JPEG"), 9, b"\x09"), BROKEN),
    "jpeg with sampling 0": (lambda: frame(saved("JPEG"), 11, b"\0"), BROKEN),
    "jpeg with sampling 15 x 15": (lambda: frame(saved("JPEG"), 11, b"\xff"), BROKEN),
    "jpeg of 12 bits": (lambda: frame(saved("JPEG"), 4, b"\x0c"), BROKEN),
    "jpeg of no bits": (lambda: frame(saved("JPEG"), 4, b"\0"), BROKEN),
    "jpeg that claims to be lossless": (lambda: sof(saved("JPEG"), 0xC3), BROKEN),
    "jpeg that claims to be arithmetic": (lambda: sof(saved("JPEG"), 0xC9), BROKEN),
    "jpeg that claims to be progressive": (lambda: sof(saved("JPEG"), 0xC2), BROKEN),
    "jpeg that claims to be hierarchical": (lambda: sof(saved("JPEG"), 0xC5), BROKEN),
    "progressive jpeg": (lambda: saved("JPEG", progressive=True), STORED),
    "progressive jpeg of 500 scans of 36 megapixels": (lambda: many_scans(500), "corrupt_image"),
    "gray jpeg": (lambda: saved("JPEG", "L"), STORED),
    "gray progressive jpeg": (lambda: saved("JPEG", "L", progressive=True), STORED),
    "cmyk jpeg": (lambda: saved("JPEG", "CMYK"), STORED),
    "ycck jpeg": (lambda: (j := saved("JPEG", "CMYK"))[: j.index(b"Adobe") + 11] + b"\x02" + j[j.index(b"Adobe") + 12 :], STORED),
    "cut cmyk jpeg": (lambda: saved("JPEG", "CMYK")[:-900], BROKEN),
    "damaged cmyk jpeg": (lambda: overwritten(saved("JPEG", "CMYK"), 3000, b"\xff\xd3" + bytes(300)), BROKEN),
    "rgb jpeg": (lambda: saved("JPEG", keep_rgb=True), STORED),
    "jpeg 4:4:4": (lambda: saved("JPEG", subsampling=0), STORED),
    "jpeg 4:2:2": (lambda: saved("JPEG", subsampling=1), STORED),
    "jpeg 4:1:1": (lambda: subsampled("411"), STORED),
    "jpeg 4:4:0": (lambda: subsampled("440"), STORED),
    "jpeg of sampling that is not told": (lambda: frame(subsampled("444"), 11, b"\x22\x01\x01\x22"), BROKEN),
    "jpeg of one pixel": (lambda: resized("JPEG", 1, 1), STORED),
    "jpeg of 7 x 3": (lambda: resized("JPEG", 7, 3), STORED),
    "jpeg of 1 x 2000": (lambda: resized("JPEG", 1, 2000), "aspect_ratio"),
    "jpeg of 65500 x 1": (lambda: resized("JPEG", 65500, 1), "aspect_ratio"),
    "jpeg with 64 kB of comment": (lambda: segment_after_soi(saved("JPEG"), 0xFE, bytes(65000)), STORED),
    "jpeg with 10 MB of comments": (
        lambda: (j := saved("JPEG"))[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 150 + j[2:], STORED),
    "jpeg with a segment that runs past the end": (
        lambda: (j := saved("JPEG"))[:2] + b"\xff\xe3\xff\xff" + j[2:], BROKEN),
    "jpeg with a segment of length 0": (lambda: (j := saved("JPEG"))[:2] + b"\xff\xe3\0\0" + j[2:], EITHER),
    "jpeg with exif orientation 0": (lambda: oriented(0), STORED),
    "jpeg with exif orientation 9": (lambda: oriented(9), STORED),
    **{f"jpeg with exif orientation {value}": (lambda v=value: oriented(v), STORED) for value in range(1, 9)},
    "jpeg with noise for exif": (lambda: with_exif(random_bytes(900)), STORED),
    "jpeg with exif that is cut": (lambda: with_exif(b"II*\0\x08\0\0\0\xff\xff"), STORED),
    "jpeg with exif that points to itself": (
        lambda: with_exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + b"\x08\0\0\0"), STORED),
    "jpeg with exif of offsets beyond the end": (
        lambda: with_exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x010F, 2, 2**31, 2**31) + bytes(4)), STORED),
    "jpeg with 64 kB of exif": (lambda: with_exif(b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + bytes(60000)), STORED),
    "jpeg with an orientation of text": (
        lambda: with_exif(b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, 2, 4) + b"six\0" + bytes(4)), STORED),
    "jpeg with a broken profile": (lambda: segment_after_soi(saved("JPEG"), 0xE2, b"ICC_PROFILE\0\x01\x05" + bytes(50)), STORED),
    "jpeg with noise for a profile": (lambda: saved("JPEG", icc_profile=random_bytes(3000)), STORED),
    "jpeg with a broken Adobe marker": (lambda: segment_after_soi(saved("JPEG"), 0xEE, b"Adobe"), EITHER),
    "jpeg with a second frame": (lambda: (j := saved("JPEG"))[: scan_start(j)] + j[2:], BROKEN),
    "png called jpeg": (lambda: saved("PNG"), STORED),
}  # fmt: skip


def resized(image_format: str, width: int, height: int) -> bytes:
    """`photo()` at another size."""
    buffer = io.BytesIO()
    photo().resize((width, height)).save(buffer, image_format)
    return buffer.getvalue()


PNGS: dict[str, Case] = {
    **cuts("PNG", [0.001, 0.003, 0.01, 0.1, 0.5, 0.9, 0.99]),
    "png of its magic": (lambda: b"\x89PNG\r\n\x1a\n", BROKEN),
    "png of noise": (lambda: b"\x89PNG\r\n\x1a\n" + random_bytes(3000), BROKEN),
    "png of 400 megapixels": (lambda: png_bomb(20_000), "too_many_pixels"),
    "png of 2147483647 x 2147483647": (lambda: png(2**31 - 1, 2**31 - 1, pixels=bytes(9)), "too_many_pixels"),
    "png of width 0": (lambda: png(0, 9), BROKEN),
    "png of height 0": (lambda: png(9, 0), BROKEN),
    "png of 9000 x 9000 with data for one row": (lambda: png(9000, 9000, pixels=bytes(27001)), BROKEN),
    "png with rows missing": (lambda: png(pixels=bytes((1 + 3 * WIDTH) * (HEIGHT - 9))), BROKEN),
    "png with a hundred times the data": (lambda: png(pixels=bytes((1 + 3 * WIDTH) * HEIGHT * 100)), STORED),
    "png with 150 MB behind its pixels": (
        lambda: png().replace(chunk(b"IDAT", zlib.compress(bytes((1 + 3 * WIDTH) * HEIGHT))), chunk(b"IDAT", zeros(150))),
        STORED),
    "png without pixels": (lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)) + chunk(b"IEND", b""), BROKEN),
    "png without an end": (lambda: png()[:-12], EITHER),
    "png with a wrong sum of its header": (lambda: overwritten(png(), 29, b"\xaa\xaa"), BROKEN),
    "png with a wrong sum of its pixels": (lambda: overwritten(png(), -14, b"\xaa\xaa"), EITHER),
    "png with damaged pixels": (lambda: overwritten(saved("PNG"), 3000, random_bytes(50)), BROKEN),
    "png of an unknown filter": (lambda: png(pixels=b"\x09" + bytes((1 + 3 * WIDTH) * HEIGHT - 1)), BROKEN),
    "png of colour type 5": (lambda: png(colour=5), BROKEN),
    "png of 3 bits": (lambda: png(depth=3, colour=0), BROKEN),
    "png of an unknown compression": (lambda: overwritten(png(), 26, b"\x07"), BROKEN),
    "png with a palette that is missing": (lambda: png(colour=3), "corrupt_image"),
    "png with an index beyond its palette": (
        lambda: png(colour=3, pixels=(b"\0" + b"\xf0" * WIDTH) * HEIGHT, before=chunk(b"PLTE", bytes(6))), STORED),
    "png with palette and transparency": (lambda: saved("PNG", "P", transparency=bytes(range(256))), STORED),
    "png of one bit": (lambda: saved("PNG", "1"), STORED),
    "png of two bits": (lambda: png(depth=2, colour=0), STORED),
    "png of gray and alpha": (lambda: saved("PNG", "LA"), STORED),
    "png with alpha": (lambda: saved("PNG", "RGBA"), STORED),
    "png of 16-bit gray": (lambda: deep("gray"), STORED),
    "png of 16-bit gray and alpha": (lambda: deep("gray_alpha"), STORED),
    "png of 16-bit rgb": (lambda: deep("rgb"), STORED),
    "png of 16-bit rgba": (lambda: deep("rgba"), STORED),
    "interlaced png": (lambda: png(8, 8, interlace=1, colour=0, pixels=bytes(8 * 8 + 15)), STORED),
    "animated png": (lambda: animation("PNG"), STORED),
    "animated png of a false frame": (
        lambda: png(before=chunk(b"acTL", struct.pack(">II", 9, 0)) + chunk(b"fcTL", bytes(26))), EITHER),
    "png with text that unpacks to 100 MB": (
        lambda: png(before=chunk(b"zTXt", b"a\0\0" + zeros(100))), EITHER),
    "png with a profile that unpacks to 100 MB": (
        lambda: png(before=chunk(b"iCCP", b"a\0\0" + zeros(100))), EITHER),
    "png with a broken profile": (lambda: png(before=chunk(b"iCCP", b"a\0\0" + random_bytes(90))), EITHER),
    "png with 20 MB of text": (lambda: png(before=chunk(b"tEXt", b"a\0" + b"b" * 20_000_000)), EITHER),
    "png with 50000 chunks": (lambda: png(before=chunk(b"prVt", b"") * 50_000), STORED),
    "png with broken exif": (lambda: png(before=chunk(b"eXIf", random_bytes(90))), STORED),
    "png with exif behind its pixels": (lambda: png(after=chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0")), STORED),
    "png of one pixel": (lambda: png(1, 1), STORED),
    "png of 1 x 5000": (lambda: png(1, 5000), "aspect_ratio"),
    "png with garbage behind its end": (lambda: png() + random_bytes(3000), STORED),
}  # fmt: skip

OTHERS: dict[str, Case] = {
    **cuts("GIF", [0.001, 0.01, 0.5]),
    "gif of its magic": (lambda: b"GIF89a", BROKEN),
    "gif of one pixel": (lambda: gif(1, 1), STORED),
    "gif of 65535 x 65535": (lambda: gif(65535, 65535), "too_many_pixels"),
    "gif whose frame is larger than its screen": (lambda: gif(9, 9, (65535, 65535)), OVERSIZED),
    "gif of size 0": (lambda: gif(0, 0), EITHER),
    "gif without a frame": (lambda: gif(9, 9)[:19] + b";", BROKEN),
    "gif of impossible codes": (lambda: gif(9, 9, (9, 9), b"\x63\x02\xff\xff\0"), BROKEN),
    "gif of noise": (lambda: gif(90, 90, (90, 90), b"\x08\xff" + random_bytes(255) + b"\0"), BROKEN),
    "animated gif": (lambda: animation("GIF"), STORED),
    "gif with transparency": (lambda: saved("GIF", "P", transparency=3), STORED),
    **cuts("BMP", [0.001, 0.002, 0.5, 0.99]),
    "bmp": (lambda: saved("BMP"), STORED),
    "bmp upside down": (lambda: bmp(64, -64), STORED),
    "bmp of width 0": (lambda: bmp(0, 64), BROKEN),
    "bmp of negative width": (lambda: bmp(-64, 64), OVERSIZED),
    "bmp of 2147483647 x 2147483647": (lambda: bmp(2**31 - 1, 2**31 - 1), "too_many_pixels"),
    "bmp of 9000 x 9000 with data for 64 x 64": (lambda: bmp(9000, 9000), BROKEN),
    "bmp of 8 bits in runs": (lambda: bmp(64, 64, 8, 1, bytes(1024), b"\x40\x05\0\0" * 64 + b"\0\x01"), STORED),
    "bmp of runs that leave the picture": (lambda: bmp(64, 64, 8, 1, bytes(1024), b"\xff\x05" * 9000), EITHER),
    "bmp of runs of 36 megapixels": (lambda: bmp(6000, 6000, 8, 1, bytes(1024), b"\0\x02\xff\xff" * 9000), EITHER),
    "bmp of 16 bits": (lambda: bmp(64, 64, 16), STORED),
    "bmp of 7 bits": (lambda: bmp(64, 64, 7), BROKEN),
    "bmp of an unknown compression": (lambda: bmp(64, 64, 24, 9), BROKEN),
    "bmp of noise": (lambda: b"BM" + random_bytes(3000), OVERSIZED),
    **cuts("TIFF", [0.0005, 0.5]),
    "tiff": (lambda: saved("TIFF"), STORED),
    "tiff of its magic": (lambda: b"II*\0", BROKEN),
    "tiff of noise": (lambda: b"MM\0*" + random_bytes(3000), BROKEN),
    "tiff of gray": (lambda: gray_tiff(64, 64), STORED),
    "tiff of two pages": (lambda: animation("TIFF"), STORED),
    "tiff of 5000 pages": (lambda: tiff_pages(5000), STORED),
    "tiff of a page that follows itself": (lambda: gray_tiff(64, 64, following=8), STORED),
    "tiff whose pixels lie beyond its end": (lambda: gray_tiff(64, 64, t273=(4, 1, 2**31)), BROKEN),
    "tiff whose directory lies beyond its end": (lambda: b"II*\0\xff\xff\xff\x7f" + bytes(90), BROKEN),
    "tiff of 4 gigapixels": (lambda: gray_tiff(65535, 65535), "too_many_pixels"),
    "tiff of 9000 x 9000 with data for 64 x 64": (lambda: gray_tiff(9000, 9000), BROKEN),
    "tiff of width 0": (lambda: gray_tiff(0, 64), BROKEN),
    "tiff of 4 billion samples a pixel": (lambda: gray_tiff(64, 64, t277=(4, 1, 2**32 - 1)), BROKEN),
    "tiff of a strip table of 2 billion": (lambda: gray_tiff(64, 64, t273=(4, 2**31, 8)), BROKEN),
    "tiff of giant tiles": (lambda: gray_tiff(64, 64, t322=(4, 1, 2**30), t323=(4, 1, 2**30), t324=(4, 1, 8), t325=(4, 1, 64)), EITHER),
    "tiff of an unknown compression": (lambda: gray_tiff(64, 64, t259=(3, 1, 60000)), BROKEN),
    "tiff packed": (lambda: saved("TIFF", compression="tiff_lzw"), STORED),
    "tiff packed and damaged": (lambda: overwritten(saved("TIFF", compression="tiff_adobe_deflate"), 900, random_bytes(200)), BROKEN),
    "tiff as fax": (lambda: saved("TIFF", "1", compression="group4"), STORED),
    "tiff of jpeg": (lambda: saved("TIFF", compression="jpeg"), STORED),
    "tiff of cmyk": (lambda: saved("TIFF", "CMYK"), STORED),
    "tiff of 16 bits": (lambda: saved("TIFF", "I;16"), STORED),
    "tiff of floats": (lambda: saved("TIFF", "F"), "unsupported_mode"),
    "tiff of lab colours": (lambda: saved("TIFF", "LAB"), "unsupported_mode"),
    **cuts("WEBP", [0.01, 0.1, 0.5, 0.9, 0.99]),
    **cuts("WEBP", [0.1, 0.5, 0.9], lossless=True),
    "webp lossy": (lambda: saved("WEBP"), STORED),
    "webp lossless": (lambda: saved("WEBP", lossless=True), STORED),
    "webp with alpha": (lambda: saved("WEBP", "RGBA"), STORED),
    "webp with alpha, cut": (lambda: saved("WEBP", "RGBA")[:-600], BROKEN),
    "webp of noise": (lambda: b"RIFF\xff\xff\0\0WEBPVP8 " + random_bytes(3000), BROKEN),
    "webp of its magic": (lambda: b"RIFF\x04\0\0\0WEBP", BROKEN),
    "webp that announces 16383 x 16383": (lambda: webp_canvas(16383, 16383), OVERSIZED),
    "webp that announces 16777216 x 16777216": (lambda: webp_canvas(1 << 24, 1 << 24), OVERSIZED),
    "webp with a wrong length": (lambda: overwritten(saved("WEBP"), 4, b"\xff\xff\xff\x7f"), BROKEN),
    "animated webp": (lambda: animation("WEBP"), STORED),
    "animated webp, cut": (lambda: animation("WEBP", lossless=True)[:-5000], BROKEN),
    "webp before garbage": (lambda: saved("WEBP") + random_bytes(900), STORED),
}  # fmt: skip

CASES: dict[str, Case] = NO_PICTURES | JPEGS | PNGS | OTHERS

MEMORY = 1_100_000_000
"""Bytes beyond those of the imports: 12 for each of the pixels that the default rules admit."""


def attempt(payload: bytes) -> str:
    """`stored`, or the reason why not; what is stored must be a whole picture of 16 x 16, and `decode` must agree."""
    from data.errors import SampleError
    from data.images import ImageRules, decode, prepare

    try:
        prepared = prepare(payload, ImageRules(image_size=16))
    except SampleError as error:
        if error.reason in BROKEN:
            assert decoded(payload) in (*BROKEN, "unsupported_mode"), "decode takes what prepare refuses"
        return error.reason
    assert decode(prepared.payload).shape == (16, 16, 3)
    assert decoded(payload) == STORED, "decode refuses what prepare takes"
    return STORED


def decoded(payload: bytes) -> str:
    """What `decode` makes of it."""
    from data.errors import SampleError
    from data.images import decode

    try:
        return STORED if decode(payload).shape[2] == 3 else "not rgb"
    except SampleError as error:
        return error.reason


def main() -> None:
    """Every case in turn."""
    attempt(saved("JPEG"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name, (make, _) in CASES.items():
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        payload = make()
        begun = time.process_time()
        outcome = attempt(payload)
        seconds = time.process_time() - begun
        sys.stdout.write(json.dumps({"name": name, "outcome": outcome, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
