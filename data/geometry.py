"""Which part of a picture goes where, and at what size: arithmetic on sides, no pixels.

Legend: sides are (width, height) in pixels; aspect = width / height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from data.image_rules import ImageRules

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """The rectangle of the picture to take, the size to resample it to, and the canvas to centre that on."""

    left: int
    top: int
    width: int
    height: int
    size: Size
    canvas: Size

    def turned(self) -> Placement:
        """The same placement on the picture with its two axes exchanged."""
        size, canvas = (self.size[1], self.size[0]), (self.canvas[1], self.canvas[0])
        return Placement(self.top, self.left, self.height, self.width, size, canvas)


def place(size: Size, rules: ImageRules) -> Placement:
    """Where an upright picture of `size` goes under `rules`. A crop starts at a whole pixel, rounded down."""
    square = (rules.image_size, rules.image_size)
    match rules.resize:
        case "no":
            return Placement(0, 0, *size, size, size)
        case "center_crop":
            return _cover(size, square)
        case "keep_ratio":
            scaled = _scaled(size, rules.image_size, min(size))
            return Placement(0, 0, *size, scaled, scaled)
        case "border":
            return Placement(0, 0, *size, _scaled(size, rules.image_size, max(size)), square)
        case "bucket":
            return _cover(size, nearest_bucket(size, rules))


def buckets(rules: ImageRules) -> tuple[Size, ...]:
    """The bucket sizes of `rules`, from the widest to the tallest; with (w, h) also (h, w), and always the square.

    Both sides are multiples of min(bucket_step, image_size // 4), the aspect lies within 1/bucket_aspect_ratio to
    bucket_aspect_ratio, and one side is the multiple that comes nearest to image_size^2 pixels given the other.
    """
    return _buckets(rules.image_size, rules.bucket_step, rules.bucket_aspect_ratio)


def nearest_bucket(size: Size, rules: ImageRules) -> Size:
    """The bucket whose log aspect is nearest to that of `size`; of two as near, the squarer."""
    aspect = math.log(size[0] / size[1])
    return min(
        buckets(rules),
        key=lambda bucket: (
            round(abs(math.log(bucket[0] / bucket[1]) - aspect), 12),
            abs(math.log(bucket[0] / bucket[1])),
        ),
    )


@lru_cache
def _buckets(image_size: int, bucket_step: int, longest: float) -> tuple[Size, ...]:
    step = min(bucket_step, image_size // 4)
    square = round(image_size / step) * step
    found = {(square, square)}
    for width in range(step, math.ceil(image_size * math.sqrt(longest)) + step, step):
        height = max(1, round(image_size**2 / width / step)) * step
        if max(width, height) <= longest * min(width, height):
            found |= {(width, height), (height, width)}
    return tuple(sorted(found, key=lambda size: (-size[0] / size[1], size)))


def _cover(size: Size, target: Size) -> Placement:
    """The middle part of the picture that has the target's shape and is as large as can be."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = (min(side, max(1, round(goal / scale))) for side, goal in zip(size, target, strict=True))
    return Placement((size[0] - width) // 2, (size[1] - height) // 2, width, height, target, target)


def _scaled(size: Size, target: int, side: int) -> Size:
    return max(1, round(size[0] * target / side)), max(1, round(size[1] * target / side))
