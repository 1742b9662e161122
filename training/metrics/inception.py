"""Features of FID's Inception v3, on which the published FID and KID are defined. Weights come from a local file.

Legend: B pictures, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.pretrained import DAMAGED, without_tf32

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_FILE}"
"""The public port of TensorFlow's inception-2015-12-05 graph, from the releases of pytorch-fid."""

SIDE = 299
WIDTH = 2048
MICRO_BATCH = 16
"""Pictures per forward pass, the last one padded: kernels are chosen by batch size, and with them the last bits."""

Resize = Literal["tf1", "clean"]
"""The published conventions: bilinear as in TensorFlow 1, or Pillow's bicubic on floats. They are two metrics."""


def load_inception(
    path: str | Path, expect_sha256: str | None = WEIGHTS_SHA256, *, as_published: bool = False
) -> nn.Module:
    """The feature network in evaluation mode, on the CPU, mapping normalised (B, 3, 299, 299) to (B, 2048) float32.

    Each normalisation is folded into its convolution and the layout is channels-last, which takes half of the time on a CPU and
    changes a feature in its seventh digit; `as_published` keeps layers and layout, and with them every bit of torch-fidelity's.
    The network's `head` (1008, 2048) are the weights of the last layer.

    `path` is a local .pth (tensors only) or .safetensors. `expect_sha256` is the file's digest in hex; None accepts any
    weights that fit. Raises FileNotFoundError, and ValueError when the digest or the tensors are not what is expected.
    """
    from training.metrics.inception_network import build_inception  # torchvision takes seconds to import

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {path}: download {WEIGHTS_FILE} from pytorch-fid's releases"
        )
    if expect_sha256 is not None:
        _check_digest(path, expect_sha256)
    with torch.device("meta"):
        model = build_inception()
    try:
        model.load_state_dict(_read_state(path), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the FID Inception v3 with 1008 classes (torchvision's ImageNet weights do not either): "
            f"use {WEIGHTS_FILE}. {' '.join(str(error).split())[:300]}"
        ) from error
    model.register_buffer("head", model.fc.weight.detach(), persistent=False)
    model.register_module("fc", nn.Identity())
    model = model.eval().requires_grad_(False)
    return model if as_published else _folded(model).to(memory_format=torch.channels_last)


@torch.inference_mode()
def features(model: nn.Module, images: Tensor | Sequence[Tensor], resize: Resize = "tf1") -> Tensor:
    """Pooled features (B, 2048) float32, on the model's device, of `images` uint8, RGB, 0 to 255: (B, 3, H, W), or a sequence
    of (3, H, W) of any sizes.

    Each picture is resized alone, by `resize_tf1` or `resize_clean`, normalised to (x - 128) / 128, and goes through in
    padded micro-batches of 16, so that row i depends on image i only. Raises ValueError for another dtype or shape: a float
    taken for 0 to 255 would give a number and no error.
    """
    if len(images) == 0:
        raise ValueError("images must be a non-empty uint8 tensor (B, 3, H, W), got none")
    for image in [images] if isinstance(images, Tensor) else [picture[None] for picture in images]:
        _require_pictures(image)
    device = next(model.parameters()).device
    with without_tf32():
        starts = range(0, len(images), MICRO_BATCH)
        return torch.cat(
            [_micro_batch(model, images[at : at + MICRO_BATCH], resize, device) for at in starts]
        )


def resize_clean(images: Tensor, side: int = SIDE) -> Tensor:
    """(B, 3, side, side) float32, 0 to 255 and not rounded: Pillow's antialiased bicubic per channel of floats, clipped
    (Parmar, Zhang & Zhu 2022, "On aliased resizing")."""
    resized = [
        np.asarray(Image.fromarray(channel.numpy()).resize((side, side), Image.Resampling.BICUBIC))
        for channel in images.cpu().float().flatten(0, 1)
    ]
    whole = torch.from_numpy(np.stack(resized)).unflatten(0, (len(images), 3))
    return whole.clamp(0.0, 255.0).to(images.device)


def resize_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """(B, 3, side, side) float32, still 0 to 255: the bilinear resize inside TensorFlow 1's Inception graph.

    Output pixel i reads the input at i * (size / side), with no half-pixel offset, no aligned corners and no antialiasing,
    and never beyond the last pixel. Columns are blended before rows, in float32, as TensorFlow does.
    """
    left, right, weight = _tf1_taps(images.shape[-1], side, images.device)
    rows = images.float()
    rows = _blend(rows.index_select(-1, left), rows.index_select(-1, right), weight)
    upper, lower, weight = _tf1_taps(images.shape[-2], side, images.device)
    return _blend(rows.index_select(-2, upper), rows.index_select(-2, lower), weight[:, None])


def _folded(model: nn.Module) -> nn.Module:
    """`model` with each batch normalisation, a fixed scale and shift by now, in the weights of the convolution before it."""
    for module in list(model.modules()):
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.register_module("conv", fuse_conv_bn_eval(conv, norm))
            module.register_module("bn", nn.Identity())
    return model


def _micro_batch(
    model: nn.Module, images: Tensor | Sequence[Tensor], resize: Resize, device: torch.device
) -> Tensor:
    resized = {"tf1": resize_tf1, "clean": resize_clean}[resize]
    if isinstance(images, Tensor):
        pixels = resized(images.to(device))
    else:
        pixels = torch.cat([resized(image[None].to(device)) for image in images])
    padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, MICRO_BATCH - len(pixels)))
    normalised = ((padded - 128.0) / 128.0).contiguous(memory_format=torch.channels_last)
    return model(normalised)[: len(images)]


def _require_pictures(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            f"images must be a non-empty uint8 tensor (B, 3, H, W) with values 0 to 255, "
            f"got {images.dtype} {tuple(images.shape)}"
        )


def _tf1_taps(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(size, dtype=torch.float32) / side  # TensorFlow keeps the scale in float32
    source = torch.arange(side, dtype=torch.float32) * scale
    low = source.long()
    return low.to(device), (low + 1).clamp(max=size - 1).to(device), (source - low).to(device)


def _blend(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    return low + (high - low) * weight


def _check_digest(path: Path, expect_sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expect_sha256.lower():
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {expect_sha256}: "
            f"FID numbers are comparable only with {WEIGHTS_FILE}: download it again"
        )


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name, floats as float32, without the batch counters that only some exports of this file have."""
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(
            f"{path} is no file of tensors that can be read safely: use {WEIGHTS_FILE}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors): use {WEIGHTS_FILE}")
    return {
        name: tensor.float() for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
