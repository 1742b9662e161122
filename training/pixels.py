"""Pictures as networks see them: uint8 0 to 255 on one side, normalised float32 on the other.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def preprocessed(pixels: Tensor, preprocess: dict[str, Any]) -> Tensor:
    """What a CLIP vision tower sees of (B, 3, H, W) uint8: resized with antialiasing, cropped, normalised; float32.

    Pictures that already have the model's size are only normalised.
    """
    size = int(preprocess["size"])
    x = pixels.float()
    if x.shape[-2:] != (size, size):
        x = _resized(x, size, preprocess)
    mean, std = (_statistic(tuple(preprocess[name]), x.device) for name in ("mean", "std"))
    return (x / 255 - mean) / std


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 0 to 255 as float32 -1 to 1."""
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """float -1 to 1 as uint8 0 to 255, rounded and clipped."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mirrored(pixels: Tensor, which: Tensor) -> Tensor:
    """(B, 3, H, W) with left and right exchanged where `which` (B,) is True."""
    return torch.where(which.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


@functools.cache
def _statistic(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(1, 3, 1, 1), made once per device: making it waits for all that the device has queued."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def _resized(x: Tensor, size: int, preprocess: dict[str, Any]) -> Tensor:
    height, width = x.shape[-2:]
    match preprocess["resize_mode"]:
        case "squash":
            target = (size, size)
        case "longest":
            target = tuple(round(side * size / max(height, width)) for side in (height, width))
        case _:
            target = tuple(side * size // min(height, width) for side in (height, width))
    x = F.interpolate(
        x,
        [max(1, side) for side in target],
        mode=preprocess["interpolation"],
        antialias=True,
        align_corners=False,
    )
    return _centred(x.round().clamp(0, 255), size, preprocess["fill_color"])


def _centred(x: Tensor, size: int, fill: int) -> Tensor:
    top, left = round((x.shape[-2] - size) / 2), round((x.shape[-1] - size) / 2)
    bottom, right = x.shape[-2] - size - top, x.shape[-1] - size - left
    return F.pad(x, (-left, -right, -top, -bottom), value=fill)  # negative padding crops
