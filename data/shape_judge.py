"""Which scene of the shapes dataset a picture shows: exact rules and the true drawings, nothing trained."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from data.shapes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, SIDE, SIZES, Scene, render

_VIEW = 24
_BLURS = (0.0, 0.8, 1.2)


def recognise(image: NDArray[np.uint8]) -> Scene:
    """The scene that (32, 32, 3) uint8 RGB `image` shows; all but the background is "none" where nothing stands out.

    Geometry alone: the border's median colour is the background, the colour farthest from it is the shape's; how much
    of each pixel that colour covers gives area, centroid and silhouette. Raises ValueError for another array.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image is {image.dtype} {image.shape}; shapes are uint8 ({SIDE}, {SIDE}, 3): convert it first"
        )
    pixels = image.astype(np.float32)
    ground = _border_colour(pixels)
    background = _nearest(ground, BACKGROUNDS)
    ink = _ink_colour(pixels, ground)
    coverage = None if ink is None else _coverage(pixels, ground, ink)
    if ink is None or coverage is None:
        return Scene("none", "none", "none", background, "none")
    shape, size = _nearest_template(coverage)
    _, x, y = _moments(coverage)
    position = min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (x - SIDE / 2, y - SIDE / 2)))
    return Scene(_nearest(ink, COLOURS), shape, size, background, position)


def matches(image: NDArray[np.uint8], truth: dict[str, Any]) -> dict[str, bool]:
    """Attribute -> whether `image` (32, 32, 3) uint8 shows it as `truth` has it; a prompt is met when all are True."""
    return {attribute: value == truth[attribute] for attribute, value in asdict(recognise(image)).items()}


def _border_colour(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    edges = (pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1])
    return np.median(np.concatenate(edges), axis=0)


def _nearest(colour: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: math.dist(palette[name], colour))


def _ink_colour(pixels: NDArray[np.float32], ground: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """(3,) colour of the pixels farthest from `ground`, None where none is clearly apart."""
    distance = np.linalg.norm(pixels - ground, axis=-1)
    peak = np.sort(distance, axis=None)[-10:].mean()
    return np.median(pixels[distance > 0.85 * peak], axis=0) if peak > 40 else None


def _coverage(
    pixels: NDArray[np.float32], ground: NDArray[np.float32], ink: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """(32, 32) share of each pixel that is `ink` in the largest connected object, None where there is no object."""
    mix = (pixels - ground) @ (ink - ground) / np.square(ink - ground).sum()
    regions = np.zeros(mix.shape, np.int32)
    ndimage.label(mix > 0.5, output=regions)
    if not regions.any():
        return None
    largest = regions == 1 + np.bincount(regions.flat)[1:].argmax()
    near = ndimage.binary_dilation(largest, iterations=2)
    # the middle of the ramp keeps an edge where it is and leaves noise out on both sides
    return np.where(near, np.clip(1.5 * mix - 0.25, 0, 1), 0).astype(np.float32)


def _moments(coverage: NDArray[np.float32]) -> tuple[float, float, float]:
    """Area in pixels, and the centroid's x and y in pixels from the top left corner."""
    area = float(coverage.sum())
    along = np.arange(SIDE) + 0.5
    return area, float(coverage.sum(0) @ along) / area, float(coverage.sum(1) @ along) / area


def _silhouette(coverage: NDArray[np.float32]) -> NDArray[np.float32]:
    """(24, 24) `coverage` seen from its centroid at a zoom that makes every object's area the same."""
    area, x, y = _moments(coverage)
    step = 2.4 * math.sqrt(area) / _VIEW
    affine = (step, 0, x - step * _VIEW / 2, 0, step, y - step * _VIEW / 2)
    view = Image.fromarray(coverage).transform(
        (_VIEW, _VIEW), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
    )
    return np.asarray(view)


@functools.cache
def _template(shape: str, size: str, blur: float) -> tuple[float, NDArray[np.float32]]:
    """Area and silhouette of the true drawing after a Gaussian blur of `blur` pixels."""
    pixels = render(Scene("yellow", shape, size, "black", "centre")).astype(np.float32)
    softened = np.asarray(ndimage.gaussian_filter(pixels, (blur, blur, 0)), np.float32)
    coverage = _coverage(softened, _border_colour(softened), softened[SIDE // 2, SIDE // 2])
    assert coverage is not None, f"a true {size} {shape} shows nothing"
    return _moments(coverage)[0], _silhouette(coverage)


def _nearest_template(coverage: NDArray[np.float32]) -> tuple[str, str]:
    """(shape, size): the shape by its silhouette at whichever sharpness fits, the size by area against that drawing."""
    seen = _silhouette(coverage)
    candidates = itertools.product(SHAPES, SIZES, _BLURS)
    shape, _, blur = min(candidates, key=lambda c: float(np.square(seen - _template(*c)[1]).sum()))
    area = _moments(coverage)[0]
    return shape, min(SIZES, key=lambda size: abs(math.log(area / _template(shape, size, blur)[0])))
