"""Resize rules of the same name as img2dataset's, held against its own Resizer: sizes to the pixel, pictures closely."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data.images import ImageRules, prepare
from tests.readers.conftest import Reading, pixels

pytestmark = [pytest.mark.slow, pytest.mark.peers]

SIDE = 64
SIZES = [
    *((200, 133), (133, 200), (333, 250), (640, 427), (427, 640), (99, 98), (129, 65)),
    *((64, 64), (65, 64), (64, 191), (641, 64), (1001, 77)),
    *((40, 30), (17, 63), (3, 5)),
]
"""Larger and smaller than the target, odd, long, and of sides whose scaled length lies near a half."""

RESIZER = """
import io, os
from img2dataset.resizer import Resizer
mode, side, *paths = sys.argv[1:]
resizer = Resizer(int(side), mode, False, encode_format="png", encode_quality=1)
found = []
for path in paths:
    with open(path, "rb") as file:
        payload, width, height, original_width, original_height, error = resizer(io.BytesIO(file.read()))
    found.append([error, [width, height, original_width, original_height], payload and text(payload)])
result(found)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Soft forms, as photographs have: what a filter makes of noise is its own taste."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for width, height in SIZES:
        coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
        soft = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"{width}x{height}.png")
        Image.fromarray(soft).save(paths[-1])
    return paths


def likeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    """dB between two pictures of one size."""
    error = np.square(ours.astype(float) - theirs).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def least_likeness(side: int) -> float:
    """In dB, by the shorter side of the original: a crop begins at a whole pixel of it here, of the scaled one there."""
    return 39 if side >= SIDE else 35 if side > 10 else 25


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "center_crop", "border"])
def test_a_rule_gives_the_sizes_and_the_pictures_of_img2datasets(
    pictures: list[Path], reading: Reading, environment: Callable[..., str], mode: Any
) -> None:
    python = environment("img2dataset", "img2dataset==1.47.0", "setuptools<81")
    theirs = reading(RESIZER, mode, str(SIDE), *map(str, pictures), python=python)
    rules = ImageRules(image_size=SIDE, resize=mode, encode_format="png", max_aspect_ratio=100)
    for path, (error, sizes, payload) in zip(pictures, theirs, strict=True):
        assert error is None, (path.name, error)
        made = prepare(path.read_bytes(), rules)
        assert [made.width, made.height, made.original_width, made.original_height] == sizes, path.name
        here, there = pixels(made.payload), pixels(base64.b64decode(payload))
        assert likeness(here, there) > least_likeness(min(sizes[2:])), path.name
        if mode == "no" or sizes[:2] == sizes[2:]:
            np.testing.assert_array_equal(here, there)
