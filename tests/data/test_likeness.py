"""Pictures that look alike have near hashes; near hashes are found exactly, the first of them staying."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.errors import SampleError
from data.likeness import hash_values, near_duplicates, payload_hash, perceptual_hash


def _photo(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """Smooth random colours: as a photograph, most of it is in the low frequencies."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, image_format: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


def _one_by_one(hashes: list[int], max_distance: int) -> list[int]:
    """The definition, without any cleverness."""
    kept: list[int] = []
    found = []
    for row, value in enumerate(hashes):
        near = [k for k in kept if (hashes[k] ^ value).bit_count() <= max_distance]
        found.append(near[0] if near else -1)
        if not near:
            kept.append(row)
    return found


def test_a_hash_is_sixteen_hex_digits_of_pixels_or_of_an_image() -> None:
    image = _photo(0)
    digits = perceptual_hash(image)
    assert len(digits) == 16 and int(digits, 16) >= 0
    assert perceptual_hash(np.asarray(image)) == digits
    assert perceptual_hash(image.convert("RGBA")) == digits


@pytest.mark.parametrize("seed", range(8))
def test_a_picture_changed_a_little_has_a_near_hash_and_another_picture_has_not(seed: int) -> None:
    image = _photo(seed)
    original = perceptual_hash(image)
    brighter = image.point(lambda value: min(255, round(value * 1.05)))
    assert _distance(original, perceptual_hash(image.resize((111, 83)))) <= 4
    assert _distance(original, perceptual_hash(brighter)) <= 4
    assert _distance(original, payload_hash(_saved(image, quality=40))) <= 4
    assert _distance(original, perceptual_hash(_photo(seed + 100))) > 10
    assert _distance(original, perceptual_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))) > 10


@pytest.mark.parametrize("size", [(20, 20), (33, 70), (256, 256), (2000, 1500)])
def test_a_jpeg_is_hashed_reduced_and_any_other_format_whole(size: tuple[int, int]) -> None:
    image = _photo(3, *size)
    whole = perceptual_hash(image)
    assert _distance(payload_hash(_saved(image, quality=95)), whole) <= 4
    assert payload_hash(_saved(image, "PNG")) == whole


def test_broken_bytes_have_no_hash() -> None:
    with pytest.raises(SampleError):
        payload_hash(_saved(_photo(0))[:-500])


def test_the_first_of_near_rows_stays_and_likeness_does_not_spread() -> None:
    rows = np.array([0b0000, 0b1111 << 60, 0b0001, 0b0011, 0b0000, 0b0111], np.uint64)
    assert near_duplicates(rows, 0).tolist() == [-1, -1, -1, -1, 0, -1]
    assert near_duplicates(rows, 1).tolist() == [-1, -1, 0, -1, 0, 3]
    assert near_duplicates(rows, 2).tolist() == [-1, -1, 0, 0, 0, -1]
    assert near_duplicates(rows, 3).tolist() == [-1, -1, 0, 0, 0, 0]
    assert near_duplicates(rows[::-1].copy(), 1).tolist() == [-1, -1, 0, 1, -1, 1]


def test_no_rows_have_no_duplicates() -> None:
    assert near_duplicates(np.zeros(0, np.uint64), 4).shape == (0,)
    assert near_duplicates(hash_values([]), 0).dtype == np.int64


def test_hashes_become_numbers_in_order() -> None:
    assert hash_values(["00000000000000ff", "ffffffffffffffff"]).tolist() == [255, 2**64 - 1]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 63), max_size=6)), max_size=60),
    st.integers(0, 8),
)
def test_it_is_what_comparing_each_row_with_all_kept_ones_gives(
    centres: list[int], changes: list[tuple[int, set[int]]], max_distance: int
) -> None:
    rows = centres + [
        centres[which % len(centres)] ^ sum(1 << bit for bit in bits) for which, bits in changes
    ]
    found = near_duplicates(np.array(rows, np.uint64), max_distance)
    assert found.tolist() == _one_by_one(rows, max_distance)


def test_every_bit_counts_wherever_it_lies() -> None:
    for bit in range(64):
        rows = np.array([0, 1 << bit], np.uint64)
        assert near_duplicates(rows, 1).tolist() == [-1, 0]
        assert near_duplicates(rows, 0).tolist() == [-1, -1]
