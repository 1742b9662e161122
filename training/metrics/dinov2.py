"""DINOv2 as a feature extractor: the network behind FD-DINOv2 (Stein et al. 2023).

Legend: B pictures, H W pixels, D width (1024 for ViT-L/14).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.errors import UserError
from training.pretrained import (
    DAMAGED,
    config_of,
    frozen,
    in_one_line,
    require_safetensors,
    require_uint8,
    transformers_model,
    without_tf32,
)

SIDE = 224
MICRO_BATCH = 16
"""Pictures per forward pass, the last one padded: kernels are chosen by batch size, and with them the last bits."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dinov2(folder: str | Path) -> Any:
    """A transformers `Dinov2Model`, frozen, on the CPU, from a local folder with config.json and safetensors weights.

    Raises UserError when the folder is incomplete or holds another kind of network.
    """
    import transformers

    kind = config_of(Path(folder)).get("model_type")
    if kind != "dinov2":
        raise UserError(f"{folder} holds a {kind} and no dinov2: give a folder such as facebook/dinov2-large")
    require_safetensors(Path(folder), "transformers DINOv2")
    try:
        model = transformers_model(transformers.Dinov2Model, Path(folder))
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{folder} holds no DINOv2 that can be loaded ({in_one_line(error)}): copy it again"
        ) from error
    return frozen(model, "cpu")


@torch.inference_mode()
def features(model: Any, images: Sequence[Tensor]) -> Tensor:
    """The class token after the last norm (B, D) float32, of pictures (3, H, W) uint8 of any sizes.

    Raises ValueError for another dtype or shape.
    """
    device = next(model.parameters()).device
    rows = []
    with without_tf32():
        for start in range(0, len(images), MICRO_BATCH):
            chunk = images[start : start + MICRO_BATCH]
            pixels = torch.cat([resize_dinov2(image[None].to(device)) for image in chunk])
            padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, MICRO_BATCH - len(chunk)))
            rows.append(model(pixel_values=padded).pooler_output[: len(chunk)])
    return torch.cat(rows)


def resize_dinov2(images: Tensor) -> Tensor:
    """(B, 3, 224, 224) float32, normalised with ImageNet's statistics, of (B, 3, H, W) uint8: antialiased bicubic to the
    square, aspect ratio not kept, neither rounded nor clipped, as the EDM2 evaluation has it."""
    require_uint8(images)
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return (x / 255 - mean) / std
