"""Where a picture goes is a function of its sides: squares, borders, ratios, and buckets of nearly equal area."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.geometry import buckets, nearest_bucket, place
from data.images import ImageRules, prepare

BUCKETED = ImageRules(resize="bucket", image_size=256)
SIDES = st.integers(16, 6000)


@pytest.mark.parametrize(
    ("resize", "placed"),
    [
        ("no", (0, 0, 101, 50, (101, 50), (101, 50))),
        ("center_crop", (25, 0, 50, 50, (20, 20), (20, 20))),
        ("keep_ratio", (0, 0, 101, 50, (40, 20), (40, 20))),
        ("border", (0, 0, 101, 50, (20, 10), (20, 20))),
    ],
)
def test_part_size_and_canvas_of_each_rule(resize: Any, placed: tuple) -> None:
    found = place((101, 50), ImageRules(resize=resize, image_size=20))
    assert (found.left, found.top, found.width, found.height, found.size, found.canvas) == placed
    assert found.turned().turned() == found
    assert place((50, 101), ImageRules(resize=resize, image_size=20)) == found.turned()


def test_the_buckets_of_256_pixels() -> None:
    assert buckets(BUCKETED) == (
        (384, 192),
        (320, 192),
        (256, 256),
        (192, 320),
        (192, 384),
    )


RULES = st.builds(
    ImageRules,
    resize=st.just("bucket"),
    image_size=st.integers(8, 1024),
    bucket_step=st.sampled_from([8, 16, 32, 64]),
    bucket_aspect_ratio=st.floats(1, 4),
)


@given(RULES)
def test_buckets_have_about_one_area_whole_steps_and_bounded_shapes(rules: ImageRules) -> None:
    step = min(rules.bucket_step, rules.image_size // 4)
    found = buckets(rules)
    assert len(set(found)) == len(found) and {(h, w) for w, h in found} == set(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert max(width, height) <= rules.bucket_aspect_ratio * min(width, height)
        shortest = rules.image_size / math.sqrt(rules.bucket_aspect_ratio)
        assert abs(width * height / rules.image_size**2 - 1) <= step / (shortest - step / 2)


@given(SIDES, SIDES)
def test_a_picture_goes_to_the_bucket_nearest_in_log_aspect_and_fills_it(width: int, height: int) -> None:
    found = place((width, height), BUCKETED)
    aspect = math.log(width / height)
    distances = [abs(math.log(w / h) - aspect) for w, h in buckets(BUCKETED)]
    assert found.size == found.canvas == nearest_bucket((width, height), BUCKETED)
    assert abs(math.log(found.size[0] / found.size[1]) - aspect) <= min(distances) + 1e-9
    assert 0 <= found.left <= width - found.width and 0 <= found.top <= height - found.height
    assert (
        abs(2 * found.left - (width - found.width)) <= 1 and abs(2 * found.top - (height - found.height)) <= 1
    )
    assert found.width == width or found.height == height
    assert nearest_bucket((height, width), BUCKETED) == found.size[::-1]


@given(SIDES, st.floats(-math.log(2), math.log(2)))
def test_a_crop_to_a_bucket_costs_at_most_a_quarter_of_a_picture_within_its_shapes(
    width: int, log_aspect: float
) -> None:
    height = max(8, round(width / math.exp(log_aspect)))
    if not 0.5 <= width / height <= 2:
        return
    found = place((width, height), BUCKETED)
    assert found.width * found.height >= 0.75 * width * height


@pytest.mark.parametrize(
    ("size", "stored"), [((300, 300), (256, 256)), ((900, 500), (320, 192)), ((200, 1000), (192, 384))]
)
def test_a_stored_picture_has_its_buckets_size_and_the_middle_of_the_original(
    size: tuple[int, int], stored: tuple[int, int]
) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    middle = (size[0] // 2 - 5, size[1] // 2 - 5)
    image.paste((0, 0, 255), (*middle, middle[0] + 11, middle[1] + 11))
    for image_format in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, image_format)
        prepared = prepare(buffer.getvalue(), BUCKETED)
        assert (prepared.width, prepared.height) == stored
        pixels = np.asarray(Image.open(io.BytesIO(prepared.payload))).astype(int)
        assert pixels.shape == (stored[1], stored[0], 3)
        assert np.abs(pixels[stored[1] // 2, stored[0] // 2] - (0, 0, 255)).max() < 40


def test_a_picture_that_has_its_buckets_size_passes_through() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (320, 192)).save(buffer, "JPEG")
    assert prepare(buffer.getvalue(), BUCKETED).payload == buffer.getvalue()
