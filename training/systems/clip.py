"""CLIP trained from scratch: an open_clip model of configured size, published in open_clip's local-dir form.

Legend: B batch of this rank, G batch over all ranks, L context length.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from training.encoders import CLIP_CONFIG, CLIP_WEIGHTS
from training.pixels import mirrored, preprocessed
from training.randomness import Draws
from training.systems.system import Batch, Columns, TrainConfig

MAX_LOGIT_SCALE = 100.0
"""Largest inverse temperature (Radford et al. 2021, arXiv 2103.00020, section 2.5)."""


class ClipConfig(TrainConfig):
    """A small CLIP; with `pretrained` nothing is trained and only that encoder is used."""

    pretrained: str | None = Field(
        None,
        description="open_clip's MODEL/TAG, a hub name OWNER/NAME of a transformers CLIP, or a folder as open_clip or "
        "transformers keeps it; None: train one",
    )
    embed_dim: int = Field(64, ge=8, description="width of the image and text embeddings")
    image_size: int = Field(32, ge=8, description="side of the pictures that the network sees, in pixels")
    vision_width: int = Field(96, ge=8, description="width of the vision transformer")
    vision_layers: int = Field(4, ge=1, description="blocks of the vision transformer")
    vision_heads: int = Field(4, ge=1, description="attention heads of the vision transformer")
    vision_patch_size: int = Field(4, ge=1, description="side of a patch in pixels; divides image_size")
    text_width: int = Field(
        64, ge=8, description="width of the text transformer; the prior needs it equal to embed_dim"
    )
    text_layers: int = Field(3, ge=1, description="blocks of the text transformer")
    text_heads: int = Field(4, ge=1, description="attention heads of the text transformer")
    context_length: int = Field(
        24, ge=4, le=77, description="most tokens of a caption, start and end included"
    )

    max_shift: int = Field(
        2,
        ge=0,
        description="training pictures are moved by up to this many pixels each way, their edges repeated",
    )

    flip: bool = Field(
        False,
        description="mirror half of the training pictures, left and right; not where captions or letters tell the sides",
    )

    @model_validator(mode="after")
    def _divisible(self) -> ClipConfig:
        for whole, part in (
            ("image_size", "vision_patch_size"),
            ("vision_width", "vision_heads"),
            ("text_width", "text_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} {getattr(self, whole)} is not a multiple of {part} {getattr(self, part)}"
                )
        if self.accumulate > 1:
            raise ValueError(
                f"accumulate {self.accumulate} would show each caption fewer pictures than batch_size: CLIP's loss needs the "
                "whole batch at once; use more workers, or activation_checkpointing"
            )
        return self


@dataclass(frozen=True)
class Clip:
    """The contrastive trainable."""

    config: ClipConfig
    columns: tuple[str, ...] = ("image", "caption")

    def build(self) -> nn.Module:
        """An open_clip `CLIP`; its forward takes (pixels, tokens) and returns both embeddings and the scale."""
        from open_clip.model import CLIP

        return CLIP(**model_config(self.config))

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Contrastive loss of each sample against the captions and pictures of all ranks: (B,) float32."""
        device = batch["image"].device
        tokens = tokenized(tuple(batch["caption"]), self.config.context_length).to(device, non_blocking=True)
        pictures = batch["image"]
        if self.config.flip:
            pictures = mirrored(pictures, draws.uniform("clip.flip") < 0.5)
        moved = shifted(pictures, self._shifts(draws), self.config.max_shift)
        image, text, scale = model(preprocessed(moved, preprocess_config(self.config)), tokens)
        scale = scale.float().clamp(max=MAX_LOGIT_SCALE)
        return contrastive_loss(image.float(), text.float(), scale, batch.get("weight"))

    def _shifts(self, draws: Draws) -> Tensor:
        return draws.integers("clip.shift", 2 * self.config.max_shift + 1, (2,)) - self.config.max_shift

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Writes open_clip's local-dir form; the facts are the sizes of what the encoder will write."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": model_config(self.config), "preprocess_cfg": preprocess_config(self.config)}
        (folder / CLIP_CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, folder / CLIP_WEIGHTS
        )
        return {
            name: getattr(self.config, name)
            for name in ("embed_dim", "text_width", "context_length", "image_size")
        }


def fit(config: ClipConfig, columns: Columns) -> Clip:  # noqa: ARG001
    """The trainable; CLIP needs no statistics of the data."""
    return Clip(config)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, weight: Tensor | None = None) -> Tensor:
    """Symmetric cross-entropy (B,) of matching pairs among all ranks' (Radford et al. 2021, arXiv 2103.00020, fig. 3).

    `image` and `text` (B, D) are L2-normalised; row i of one belongs to row i of the other. Nothing is held against a row
    of `weight` 0, whose own loss says nothing.
    """
    images, texts, first = _gathered(image), _gathered(text), _rank() * len(image)
    matching = torch.arange(first, first + len(image), device=image.device)
    by_image, by_text = scale * image @ texts.T, scale * text @ images.T
    if weight is not None:
        absent = _gathered(weight) == 0
        by_image, by_text = (logits.masked_fill(absent, -torch.inf) for logits in (by_image, by_text))
    each = [F.cross_entropy(logits, matching, reduction="none") for logits in (by_image, by_text)]
    return (each[0] + each[1]) / 2


def shifted(pixels: Tensor, shifts: Tensor, max_shift: int) -> Tensor:
    """Pictures (B, 3, H, W) moved down and right by `shifts` (B, 2) pixels in [-max_shift, max_shift], edges repeated.

    Without it a small CLIP learns its few thousand pictures by heart instead of what shapes look like.
    """
    if max_shift == 0:
        return pixels
    batch, channels, height, width = pixels.shape
    rows = (torch.arange(height, device=pixels.device) - shifts[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width, device=pixels.device) - shifts[:, 1:]).clamp(0, width - 1)  # (B, W)
    which = torch.arange(batch, device=pixels.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=pixels.device).view(1, -1, 1, 1)
    return pixels[which, channel, rows[:, None, :, None], columns[:, None, None, :]]


def model_config(config: ClipConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of this size."""
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "head_width": config.vision_width // config.vision_heads,
            "patch_size": config.vision_patch_size,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": 49408,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }


def preprocess_config(config: ClipConfig) -> dict[str, Any]:
    """open_clip's `preprocess_cfg`: the same values are used in training and written beside the weights."""
    return {
        "size": config.image_size,
        "mode": "RGB",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }


def tokenized(captions: tuple[str, ...], context_length: int) -> Tensor:
    """Tokens (B, L) int64 of open_clip's own BPE: start, text, end, zeros."""
    return torch.tensor([_tokens(caption, context_length) for caption in captions])


@functools.lru_cache(maxsize=1 << 18)
def _tokens(caption: str, context_length: int) -> tuple[int, ...]:
    return tuple(_tokenizer()([caption], context_length=context_length)[0].tolist())


@functools.cache
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _gathered(features: Tensor) -> Tensor:
    if not torch.distributed.is_initialized():
        return features
    from torch.distributed.nn.functional import all_gather  # its backward sums the ranks' gradients

    return torch.cat(all_gather(features))


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
