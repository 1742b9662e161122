"""Resizing is as sharp as Lanczos, keeps its place to a fraction of a pixel, and keeps to the piece that it is given."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import jpegs
from data.images import ImageRules, prepare
from data.resampling import resample


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3) with the statistics of photographs: amplitude falls with frequency, phases
    are random, and most of it is light rather than colour."""
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    amplitude = 1 / np.maximum(np.hypot(down * height, across * width), 1) ** 1.2
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phase, (height, width))
        planes.append((plane - plane.mean()) / plane.std())
    light = planes[0][..., None]
    return np.clip(128 + 45 * light + 8 * np.stack(planes, -1), 0, 255).astype(np.uint8)


def lanczos(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's, on all pixels of the original."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Decibels between two uint8 pictures."""
    return float(10 * np.log10(255**2 / np.mean((first.astype(float) - second.astype(float)) ** 2)))


@pytest.mark.parametrize("side", [135, 150, 187, 216, 250, 255, 256, 300, 385, 500, 769, 1023])
def test_it_is_within_38_decibels_of_lanczos_at_every_reduction(side: int) -> None:
    pixels = natural(side, side)
    assert psnr(resample(pixels, (side, side), (128, 128)), lanczos(pixels, (128, 128))) >= 38


@pytest.mark.parametrize("side", [513, 770, 1025, 1151, 1500])
def test_a_jpeg_that_is_reduced_while_decoding_loses_no_more_than_a_decibel_and_a_half(side: int) -> None:
    pixels = natural(side, side)
    payload = jpegs.encode(pixels, 92)
    exact = lanczos(jpegs.pixels(payload), (128, 128))
    full = resample(jpegs.pixels(payload), (side, side), (128, 128))
    stored = prepare(payload, ImageRules(image_size=128, encode_format="png")).payload
    reduced = np.asarray(Image.open(io.BytesIO(stored)))
    assert psnr(reduced, exact) >= 36
    assert psnr(reduced, exact) >= psnr(full, exact) - 1.5


def test_what_has_the_size_already_comes_back_as_it_is() -> None:
    pixels = natural(40, 30)
    np.testing.assert_array_equal(resample(pixels, (30, 40), (30, 40)), pixels)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(1, 90), st.integers(0, 255))
def test_any_size_becomes_any_other_and_one_colour_stays_that_colour(
    width: int, height: int, new_width: int, new_height: int, value: int
) -> None:
    pixels = np.full((height, width, 3), value, np.uint8)
    found = resample(pixels, (width, height), (new_width, new_height))
    assert found.shape == (new_height, new_width, 3) and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - value).max() <= 1


def test_an_extent_that_is_not_whole_keeps_its_scale() -> None:
    ramp = np.repeat(np.linspace(0, 250, 101)[None, :], 50, axis=0)
    pixels = np.repeat(ramp[..., None], 3, axis=-1).astype(np.uint8)
    found = resample(pixels, (100.5, 50), (67, 33))[16, 5:-5, 0]
    places = (np.arange(67)[5:-5] + 0.5) * 100.5 / 67 - 0.5
    np.testing.assert_allclose(found, places * 2.5, atol=1.5)


@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_an_offset_moves_the_part_that_is_taken(left: float, top: float) -> None:
    row, column = np.mgrid[0:90, 0:90]
    pixels = np.stack([2 * column, 2 * row, column + row], -1).astype(np.uint8)
    moved = resample(pixels, (80, 80), (32, 32), (left, top)).astype(int)[5:-5, 5:-5]
    still = resample(pixels, (80, 80), (32, 32)).astype(int)[5:-5, 5:-5]
    np.testing.assert_allclose(
        moved - still, np.broadcast_to([2 * left, 2 * top, left + top], still.shape), atol=1.1
    )


def test_a_view_is_taken_for_what_it_shows_and_is_not_changed() -> None:
    whole = natural(200, 300)
    before = whole.copy()
    view = whole[20:180, 50:210]
    np.testing.assert_array_equal(
        resample(view, (160, 160), (64, 64)), resample(view.copy(), (160, 160), (64, 64))
    )
    np.testing.assert_array_equal(whole, before)
    whole.flags.writeable = False
    assert resample(whole, (300, 200), (30, 20)).shape == (20, 30, 3)


def test_opencv_keeps_to_one_thread_and_says_nothing() -> None:
    script = "import cv2, data.resampling; print(cv2.getNumThreads())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
