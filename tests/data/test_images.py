"""Pictures are admitted by their header, brought upright to 8-bit RGB by stated rules, and refused with a reason."""

from __future__ import annotations

import io
import json
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

sys.path.insert(0, str(Path(__file__).parent))
import profiles

from data import jpegs
from data.errors import SampleError
from data.images import ImageRules, admit, decode, prepare

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
AS_IT_IS = ImageRules(resize="no", encode_format="png")


def _saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def _noise(height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _blank_png(width: int, height: int) -> bytes:
    """A true 1-bit PNG of any size, its rows compressed one after another."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", pixels) + _png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _oriented(orientation: int, image_format: str = "JPEG", **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(_halves(), image_format, exif=exif, **options)


def _pixels(payload: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(payload)) as image:
        assert image.mode == "RGB"
        return np.array(image)


def _reason(payload: bytes, rules: ImageRules = AS_IT_IS, step: Callable = prepare) -> tuple[str, bool]:
    with pytest.raises(SampleError) as caught:
        step(payload, rules)
    return caught.value.reason, caught.value.filtered


HOSTILE = {
    "zero bytes": (b"", "empty_file"),
    "a web page": (b"\n <!DOCTYPE html><html><body>404</body></html>", "html"),
    "text": (b"this is not a picture", "not_an_image"),
    "an archive": (b"PK\x03\x04" + bytes(100), "not_an_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    "a cut jpeg": (_saved(_noise(), "JPEG")[:-200], "truncated"),
    "a cut png": (_saved(_noise(), "PNG")[:-500], "truncated"),
    "a cut webp": (_saved(_noise(), "WEBP", lossless=True)[:-500], "corrupt_image"),
    "a jpeg's first bytes": (_saved(_noise(), "JPEG")[:12], "truncated"),
    "a png of no size": (b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", bytes(13)), "corrupt_image"),
    "an overwritten png": (
        _saved(_noise(), "PNG")[:45] + b"\xaa" * 500 + _saved(_noise(), "PNG")[545:],
        "corrupt_image",
    ),
    "pixels of floats": (_saved(Image.new("F", (9, 9)), "TIFF"), "unsupported_mode"),
    "lab colours": (_saved(Image.new("LAB", (9, 9)), "TIFF"), "unsupported_mode"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_whole_picture_is_refused_with_its_reason(name: str) -> None:
    payload, reason = HOSTILE[name]
    assert _reason(payload) == (reason, False)


def test_four_hundred_megapixels_are_refused_before_decoding() -> None:
    payload = _blank_png(20_000, 20_000)
    assert len(payload) < 300_000
    assert _reason(payload, step=admit) == ("too_many_pixels", False)
    assert _reason(payload) == ("too_many_pixels", False)


@pytest.mark.parametrize("side", [9_500, 14_000])
def test_a_large_picture_within_the_users_limit_raises_no_warning(side: int) -> None:
    header = admit(_blank_png(side, side), ImageRules(max_pixels=10**9))
    assert (header.width, header.height, header.format, header.mode) == (side, side, "PNG", "1")


def test_pillows_own_limits_are_left_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    admit(_blank_png(14_000, 14_000), ImageRules(max_pixels=10**9))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


@pytest.mark.parametrize(
    ("rules", "reason", "filtered"),
    [
        ({"max_bytes": 10}, "too_many_bytes", False),
        ({"max_pixels": 799}, "too_many_pixels", False),
        ({"min_size": 21}, "too_small", True),
        ({"max_aspect_ratio": 1.99}, "aspect_ratio", True),
    ],
)
def test_limits_are_checked_against_the_header(rules: dict, reason: str, filtered: bool) -> None:
    payload = _saved(_halves(), "PNG")
    assert _reason(payload, ImageRules(**rules), admit) == (reason, filtered)
    admit(payload, ImageRules(max_bytes=len(payload), max_pixels=800, min_size=20, max_aspect_ratio=2))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_format_is_read_from_the_bytes(image_format: str) -> None:
    header = admit(_saved(_noise().convert("RGB"), image_format), AS_IT_IS)
    assert (header.format, header.width, header.height, header.animated) == (image_format, 32, 24, False)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_the_camera_meant_it(orientation: int, image_format: str) -> None:
    options = {} if image_format == "JPEG" else {"lossless": True} if image_format == "WEBP" else {}
    prepared = prepare(_oriented(orientation, image_format, **options), AS_IT_IS)
    sides = {1: "left", 2: "right", 3: "right", 4: "left", 5: "top", 6: "top", 7: "bottom", 8: "bottom"}
    pixels = _pixels(prepared.payload).astype(int)
    height, width, _ = pixels.shape
    assert (width, height) == ((40, 20) if orientation < 5 else (20, 40))
    assert (prepared.original_width, prepared.original_height) == (width, height)
    places = {
        "left": (height // 2, 2),
        "right": (height // 2, -3),
        "top": (2, width // 2),
        "bottom": (-3, width // 2),
    }
    assert np.abs(pixels[places[sides[orientation]]] - RED).max() < 40
    assert json.loads(prepared.exif or "{}") == {"Orientation": str(orientation)}


def _gray16(values: list[int]) -> bytes:
    return _saved(Image.fromarray(np.array([values], np.uint16)), "PNG")


def test_sixteen_bits_become_eight_by_division_by_257() -> None:
    values = [0, 128, 129, 257, 25700, 65406, 65407, 65535]
    pixels = _pixels(prepare(_gray16(values), AS_IT_IS).payload)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 100, 254, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def test_transparency_is_composited_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    rgba = Image.new("RGBA", (2, 1), (*RED, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    gray = Image.new("LA", (2, 1), (0, 255))
    gray.putpixel((1, 0), (0, 0))
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), BLUE)
    cases = [
        (_saved(palette, "PNG", transparency=bytes([255, 0])), RED),
        (_saved(palette, "PNG", transparency=1), RED),
        (_saved(palette, "GIF", transparency=1), RED),
        (_saved(rgba, "PNG"), RED),
        (_saved(rgba, "WEBP", lossless=True), RED),
        (_saved(gray, "PNG"), (0, 0, 0)),
        (_saved(keyed, "PNG", transparency=BLUE), RED),
    ]
    for payload, left in cases:
        prepared = prepare(payload, AS_IT_IS)
        assert _pixels(prepared.payload)[0].tolist() == [list(left), list(WHITE)] and prepared.reencoded
        assert decode(payload)[0].tolist() == [list(left), list(WHITE)]


def test_half_transparent_is_half_white() -> None:
    payload = _saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")
    assert np.abs(_pixels(prepare(payload, AS_IT_IS).payload).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_that_are_not_rgb_become_rgb(mode: str) -> None:
    payload = _saved(_noise().convert(mode), "JPEG")
    prepared = prepare(payload, ImageRules(resize="no"))
    assert prepared.reencoded and _pixels(prepared.payload).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("mode", "colour", "profile", "image_format"),
    [
        ("RGB", (200, 60, 60), profiles.display(), "PNG"),
        ("RGB", (200, 60, 60), profiles.display(), "TIFF"),
        ("CMYK", (255, 0, 0, 0), profiles.press(), "TIFF"),
    ],
)
def test_a_colour_profile_changes_no_number_and_is_not_stored(
    mode: str, colour: tuple[int, ...], profile: bytes, image_format: str
) -> None:
    """Whatever it means: applied, it would have changed the numbers, as the profile's own reader shows."""
    image = Image.new(mode, (16, 16), colour)
    found = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    applied = ImageCms.profileToProfile(image, found, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert applied is not None
    plain = np.asarray(image.convert("RGB"))
    assert np.abs(np.asarray(applied).astype(int) - plain).max() > 10
    payload = _saved(image, image_format, icc_profile=profile)
    rules = ImageRules(image_size=8, encode_format="png")
    prepared = prepare(payload, rules)
    np.testing.assert_array_equal(_pixels(prepared.payload), plain[:8, :8])
    np.testing.assert_array_equal(decode(payload), plain)
    assert prepared.payload == prepare(_saved(image, image_format), rules).payload


@pytest.mark.parametrize(("mode", "profile"), [("RGB", profiles.display()), ("CMYK", profiles.press())])
def test_a_jpeg_with_a_profile_gives_what_the_same_without_one_gives(mode: str, profile: bytes) -> None:
    pictured = _noise().convert(mode)
    with_profile = _saved(pictured, "JPEG", quality=95, icc_profile=profile)
    without = _saved(pictured, "JPEG", quality=95)
    np.testing.assert_array_equal(decode(with_profile), decode(without))
    rules = ImageRules(image_size=16)
    assert prepare(with_profile, rules).payload == prepare(without, rules).payload


def test_an_original_that_passes_through_keeps_its_profile() -> None:
    payload = _saved(_noise(16, 16), "JPEG", icc_profile=profiles.display())
    prepared = prepare(payload, ImageRules(image_size=16))
    assert prepared.payload == payload and not prepared.reencoded


def test_the_first_frame_of_an_animation_is_taken() -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    for image_format, options in [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]:
        payload = _saved(first, image_format, save_all=True, append_images=[second], **options)
        assert admit(payload, AS_IT_IS).animated
        prepared = prepare(payload, AS_IT_IS)
        assert (_pixels(prepared.payload) == RED).all() and prepared.reencoded


@pytest.mark.parametrize(
    ("resize", "size"),
    [("center_crop", (16, 16)), ("border", (16, 16)), ("keep_ratio", (32, 16)), ("no", (40, 20))],
)
def test_sizes_after_resizing(resize: Any, size: tuple[int, int]) -> None:
    for payload, expected in [(_saved(_halves(), "PNG"), size), (_oriented(6), size[::-1])]:
        prepared = prepare(payload, ImageRules(resize=resize, image_size=16, encode_format="png"))
        assert (prepared.width, prepared.height) == expected
        assert _pixels(prepared.payload).shape == (*expected[::-1], 3)
        assert {prepared.original_width, prepared.original_height} == {40, 20}


def test_center_crop_keeps_the_middle_and_border_keeps_everything() -> None:
    image = Image.new("RGB", (60, 20), RED)
    image.paste(BLUE, (20, 0, 40, 20))
    payload = _saved(image, "PNG")
    cropped = _pixels(prepare(payload, ImageRules(image_size=20, encode_format="png")).payload)
    assert (cropped[:, 2:-2] == BLUE).all()
    padded = _pixels(
        prepare(payload, ImageRules(image_size=60, resize="border", encode_format="png")).payload
    )
    assert (padded[:20] == WHITE).all() and (padded[40:] == WHITE).all()
    np.testing.assert_array_equal(padded[20:40], np.asarray(image))


@pytest.mark.parametrize(("extension", "image_format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_an_original_that_needs_no_change_passes_through(extension: Any, image_format: str) -> None:
    payload = _saved(_noise(16, 16), image_format)
    for resize in ("center_crop", "border", "keep_ratio", "no"):
        prepared = prepare(payload, ImageRules(image_size=16, resize=resize, encode_format=extension))
        assert prepared.payload == payload and not prepared.reencoded and prepared.extension == extension


def test_an_original_that_needs_a_change_does_not_pass_through() -> None:
    rules = ImageRules(image_size=16, encode_format="png")
    deep = b"\x89PNG\r\n\x1a\n" + b"".join(
        _png_chunk(kind, body)
        for kind, body in [
            (b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress((b"\0" + bytes(96)) * 16)),
            (b"IEND", b""),
        ]
    )
    for payload in [deep, _saved(_noise(16, 16), "JPEG"), _saved(_noise(16, 16).convert("P"), "PNG")]:
        prepared = prepare(payload, rules)
        assert prepared.reencoded and _pixels(prepared.payload).shape == (16, 16, 3)
    wide = _saved(_noise(8, 16), "PNG")
    assert prepare(wide, ImageRules(image_size=16, resize="border", encode_format="png")).reencoded


def test_a_cut_original_does_not_pass_through() -> None:
    payload = _saved(_noise(64, 64), "JPEG")[:-300]
    assert _reason(payload, ImageRules(resize="no")) == ("truncated", False)


def test_damage_that_pillow_overlooks_is_refused() -> None:
    whole = _saved(_noise(64, 64), "JPEG")
    damaged = whole[:2000] + b"\xff\xd3" + whole[2002:]
    assert _pixels(damaged).shape == (64, 64, 3)
    for rules in (AS_IT_IS, ImageRules(image_size=16), ImageRules(resize="no")):
        assert _reason(damaged, rules) == ("corrupt_image", False)
    with pytest.raises(SampleError):
        decode(damaged)


def test_a_png_that_lacks_rows_is_refused() -> None:
    rows = (b"\0" + bytes([200] * 48)) * 16
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    for kept, lacks in [(16, False), (15, True), (1, True)]:
        pixels = _png_chunk(b"IDAT", zlib.compress(rows[: kept * 49]))
        payload = b"\x89PNG\r\n\x1a\n" + header + pixels + _png_chunk(b"IEND", b"")
        if lacks:
            assert _reason(payload) == ("truncated", False)
        else:
            assert (_pixels(prepare(payload, AS_IT_IS).payload) == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["center_crop", "border", "keep_ratio", "bucket", "no"])
def test_a_jpeg_gives_what_a_png_of_the_same_pixels_gives(resize: Any, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = _saved(_noise(45, 70).resize((140, 90)), "JPEG", exif=exif, subsampling=2)
    png = _saved(Image.fromarray(_pixels(jpeg)), "PNG", exif=exif)
    rules = ImageRules(resize=resize, image_size=64, encode_format="png")
    fast, plain = prepare(jpeg, rules), prepare(png, rules)
    assert (fast.width, fast.height, fast.exif) == (plain.width, plain.height, plain.exif)
    np.testing.assert_array_equal(_pixels(fast.payload), _pixels(plain.payload))


def test_a_large_jpeg_is_reduced_while_decoding_without_visible_loss() -> None:
    y, x = np.mgrid[0:1200, 0:1600].astype(np.float64)
    waves = np.stack([127 + 120 * np.sin(x / 37 + y / 53), 255 * x / 1600, 127 + 100 * np.cos(y / 21)], -1)
    image = Image.fromarray(waves.astype(np.uint8))
    small = _pixels(
        prepare(_saved(image, "JPEG", quality=95), ImageRules(image_size=128, encode_format="png")).payload
    )
    exact = image.resize((128, 128), Image.Resampling.LANCZOS, box=(200, 0, 1400, 1200))
    error = np.mean((small.astype(float) - np.asarray(exact, float)) ** 2)
    assert 10 * np.log10(255**2 / error) > 40


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_equal_input_gives_equal_bytes_whatever_the_thread(extension: Any) -> None:
    rules = ImageRules(image_size=48, encode_format=extension)
    payloads = [_oriented(6), _saved(_noise(90, 70), "TIFF"), _saved(_noise(50, 60).convert("P"), "GIF")] * 8
    expected = [prepare(payload, rules) for payload in payloads]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda payload: prepare(payload, rules), payloads)) == expected


def test_nothing_of_the_originals_metadata_is_stored_again() -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    payload = _saved(_noise(), "JPEG", exif=exif, icc_profile=b"p" * 200, comment=b"secret", dpi=(300, 300))
    for extension in ("jpg", "png", "webp"):
        rules = ImageRules(image_size=16, encode_format=extension)  # type: ignore[arg-type]
        prepared = prepare(payload, rules)
        assert prepared.exif == '{"Make": "a maker"}'
        with Image.open(io.BytesIO(prepared.payload)) as stored:
            assert not {"exif", "icc_profile", "comment", "dpi"} & set(stored.info)


def test_broken_exif_is_ignored() -> None:
    payload = _saved(_noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)
    assert prepare(payload, AS_IT_IS).width == 32


def test_decode_gives_upright_pixels_to_own() -> None:
    pixels = decode(_oriented(6))
    assert pixels.shape == (40, 20, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    with pytest.raises(SampleError):
        decode(b"")


SEEDS = [
    _oriented(6),
    _oriented(6, "PNG"),
    _oriented(6, "WEBP"),
    _oriented(6, "TIFF"),
    _saved(
        _noise().convert("P"), "GIF", save_all=True, append_images=[_noise(24, 32).convert("P").rotate(180)]
    ),
    _saved(_noise(), "BMP"),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.one_of(st.integers(0, 60), st.integers(0, 5000)), st.integers(0, 255)), max_size=8),
    st.one_of(st.none(), st.integers(0, 5000)),
)
def test_damaged_bytes_give_a_picture_or_a_reason(
    seed: bytes, damage: list[tuple[int, int]], cut: int | None
) -> None:
    payload = bytearray(seed)
    for place, value in damage:
        payload[place % len(payload)] = value
    try:
        prepared = prepare(bytes(payload[:cut]), ImageRules(image_size=8, encode_format="png"))
    except SampleError as error:
        assert error.reason.isidentifier() and " object at " not in str(error)
    else:
        assert _pixels(prepared.payload).shape == (8, 8, 3)


PHOTO = _saved(_noise(45, 70), "JPEG", quality=90, comment=b"a note", icc_profile=b"p" * 40)
HEADER_BYTES = PHOTO.index(b"\xff\xda") + 14


@settings(max_examples=400, deadline=None)
@given(st.integers(2, HEADER_BYTES), st.integers(0, 255), st.integers(0, 3))
def test_a_jpeg_is_judged_alike_whether_its_header_is_walked_or_read_by_pillow(
    at: int, value: int, cut: int
) -> None:
    payload = PHOTO[:at] + bytes([value]) + PHOTO[at + 1 + cut :]
    rules = ImageRules(image_size=16, encode_format="png", min_size=8, max_pixels=10_000)
    walked = _outcome(payload, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpegs, "bare_header", lambda _: None)
        read = _outcome(payload, rules)
    both_refused = isinstance(walked, str) and isinstance(read, str)
    assert walked == read or (both_refused and {walked, read} == {"truncated", "corrupt_image"})


def _outcome(payload: bytes, rules: ImageRules) -> Any:
    """Header, stored picture and pixels, or why there are none."""
    try:
        return admit(payload, rules), prepare(payload, rules), decode(payload).tobytes()
    except SampleError as error:
        return error.reason


@pytest.mark.parametrize(
    ("payload", "is_bare"),
    [
        (PHOTO, True),
        (_saved(_noise().convert("L"), "JPEG"), True),
        (_oriented(6), False),
        (_saved(_noise(), "JPEG", progressive=True), False),
        (_saved(_noise().convert("CMYK"), "JPEG"), False),
        (_saved(_noise(), "MPO", save_all=True, append_images=[_noise()]), False),
        (_saved(_noise(), "JPEG", xmp=b'<x tiff:Orientation="6"/>'), False),
        (_saved(_noise(), "PNG"), False),
        (PHOTO[: HEADER_BYTES - 20], False),
    ],
)
def test_a_common_jpeg_needs_no_pillow(payload: bytes, is_bare: bool) -> None:
    header = jpegs.bare_header(payload)
    assert (header is not None) == is_bare
    if header:
        with Image.open(io.BytesIO(payload)) as image:
            assert header == (image.mode, *image.size)
