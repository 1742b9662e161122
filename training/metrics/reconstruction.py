"""Reconstruction error of an autoencoder, on pictures as they are stored and shown: uint8."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

SSIM_WINDOW = 11
"""Pixels of SSIM's window, a side."""


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
    _require_pairs(originals, reconstructions)
    pairs = zip(originals, reconstructions, strict=True)
    squared = np.array([_squared_error(original, copy) for original, copy in pairs], dtype=np.float64)
    values_per_image = originals[0].size
    per_image = 10.0 * np.log10(255.0**2 * values_per_image / np.maximum(squared, 1.0))
    return Psnr(float(per_image.mean()), per_image, int((squared == 0).sum()))


@dataclass(frozen=True, eq=False, slots=True)
class Ssim:
    """Structural similarities, 1 for a copy, at least -1; higher is better."""

    mean: float
    per_image: np.ndarray
    """(N,) float64."""


def ssim(originals: np.ndarray, reconstructions: np.ndarray) -> Ssim:
    """Structural similarity per image of two uint8 arrays (N, H, W, 3) (Wang et al. 2004, eq. 13).

    Per channel, under a Gaussian window of 11x11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, range 255, over the
    windows that lie inside the picture. Raises ValueError as `psnr` does, and for pictures below 11 pixels.
    """
    _require_pairs(originals, reconstructions)
    if min(originals.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, got {originals.shape[2]}x{originals.shape[1]}"
        )
    pairs = zip(originals, reconstructions, strict=True)
    per_image = np.array([_similarity(original, copy) for original, copy in pairs])
    return Ssim(float(per_image.mean()), per_image)


def _similarity(original: np.ndarray, copy: np.ndarray) -> float:
    x, y = original.astype(np.float64), copy.astype(np.float64)
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _windowed(values: np.ndarray) -> np.ndarray:
    taps = cv2.getGaussianKernel(SSIM_WINDOW, 1.5, cv2.CV_64F)
    edge = SSIM_WINDOW // 2
    return cv2.sepFilter2D(values, cv2.CV_64F, taps, taps)[edge:-edge, edge:-edge]


def require_pictures(images: np.ndarray) -> None:
    """Raises ValueError unless `images` is a non-empty uint8 array (N, H, W, 3): a float in [0, 1] or [-1, 1] taken for
    0 to 255 would give a number and no error."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or images.size == 0:
        raise ValueError(
            f"images must be a non-empty uint8 array (N, H, W, 3) with values 0 to 255, got {images.dtype} {images.shape}"
        )


def _require_pairs(originals: np.ndarray, reconstructions: np.ndarray) -> None:
    require_pictures(originals)
    require_pictures(reconstructions)
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {originals.shape} and reconstructions {reconstructions.shape} do not pair up: "
            "give one reconstruction per original, of the same size"
        )


def _squared_error(original: np.ndarray, copy: np.ndarray) -> int:
    difference = original.astype(np.int64) - copy
    return int((difference * difference).sum())
