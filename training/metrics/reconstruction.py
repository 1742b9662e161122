"""Reconstruction error of an autoencoder, on pictures as they are stored and shown: uint8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class Psnr:
    """Peak signal-to-noise ratios in dB; higher is better."""

    mean: float
    """Mean of the decibels, not the decibels of a mean."""
    per_image: np.ndarray
    """(N,) float64."""
    num_exact: int
    """Images that came back without any difference."""


def psnr(originals: np.ndarray, reconstructions: np.ndarray) -> Psnr:
    """10 log10(255^2 / MSE) per image of two uint8 arrays (N, H, W, 3), the MSE over all its values.

    An exact copy has no finite value; it scores as if one value were off by one level, so that a mean stays finite, and
    `num_exact` counts such images. Raises ValueError for another dtype, different shapes, or no image.
    """
    require_pictures(originals)
    require_pictures(reconstructions)
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {originals.shape} and reconstructions {reconstructions.shape} do not pair up: "
            "give one reconstruction per original, of the same size"
        )
    pairs = zip(originals, reconstructions, strict=True)
    squared = np.array([_squared_error(original, copy) for original, copy in pairs], dtype=np.float64)
    values_per_image = originals[0].size
    per_image = 10.0 * np.log10(255.0**2 * values_per_image / np.maximum(squared, 1.0))
    return Psnr(float(per_image.mean()), per_image, int((squared == 0).sum()))


def require_pictures(images: np.ndarray) -> None:
    """Raises ValueError unless `images` is a non-empty uint8 array (N, H, W, 3): a float in [0, 1] or [-1, 1] taken for
    0 to 255 would give a number and no error."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(
            f"images must be a non-empty uint8 array (N, H, W, 3) with values 0 to 255, got {images.dtype} {images.shape}"
        )


def _squared_error(original: np.ndarray, copy: np.ndarray) -> int:
    difference = original.astype(np.int64) - copy
    return int((difference * difference).sum())
