"""A CLIP that transformers keeps: a folder whose config.json has `model_type` clip.

Legend: B batch, L tokens of the longest caption of a batch, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from training.pretrained import DAMAGED, in_one_line, require_safetensors, transformers_model

_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which preprocessor_config.json has, in torch's words."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
"""Either one is enough for a CLIP; the second comes with merges.txt."""
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a repository keeps the preprocessing of its pictures; newer ones join it with the tokenizer's."""


@dataclass(frozen=True)
class TransformersTowers:
    """`clip_encoder.Towers` of a transformers `CLIPModel`; captions are padded to the longest of their batch.

    Its text attention is causal, so that the padding behind a caption changes none of the caption's states.
    """

    model: Any
    tokenizer: Any
    preprocess: dict[str, Any]

    @property
    def embed_dim(self) -> int:
        """Width of both embeddings."""
        return self.model.config.projection_dim

    @property
    def text_width(self) -> int:
        """Width of the text hidden states."""
        return self.model.config.text_config.hidden_size

    @property
    def context_length(self) -> int:
        """The most tokens of a caption."""
        return self.model.config.text_config.max_position_embeddings

    def tokens(self, captions: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64, at most `max_tokens` of them no padding, and how many that are (B,) int64."""
        return padded_tokens(self.tokenizer, captions, max_tokens or self.context_length)

    def image(self, x: Tensor) -> Tensor:
        """(B, D) of preprocessed pictures."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), and the last hidden states after the final norm (B, L, W)."""
        output = self.model.text_model(input_ids=tokens)
        return self.model.text_projection(output.pooler_output), output.last_hidden_state


def load(folder: Path, dtype: torch.dtype) -> TransformersTowers:
    """The CLIP of `folder`.

    Raises UserError when a part is missing or damaged, or when its preprocessing is none that can be
    repeated here: resize the shorter side (or to a square), centre crop, rescale, normalise.
    """
    import transformers

    require_safetensors(folder, "transformers CLIP")
    require_any(folder, "preprocessing", PICTURE_FILES)
    require_any(folder, "tokenizer", TOKENIZER_FILES)
    here = {"local_files_only": True}
    try:
        model = transformers_model(transformers.CLIPModel, folder, use_safetensors=True, dtype=dtype)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, **here, padding_side="right")
        pictures = transformers.CLIPImageProcessor.from_pretrained(folder, **here)
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"no CLIP can be loaded from {folder} ({in_one_line(error)}): copy config.json, preprocessor_config.json, "
            "tokenizer.json and model.safetensors of its repository there again"
        ) from error
    return TransformersTowers(model, tokenizer, _preprocess(pictures, str(folder)))


def padded_tokens(tokenizer: Any, captions: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) int64, cut to `max_length` with the end token kept, and how many of each row are no padding."""
    batch = tokenizer(
        list(captions), padding="longest", truncation=True, max_length=max_length, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"].sum(1)


def require_any(folder: Path, what: str, names: Sequence[str]) -> None:
    """Raises UserError when `folder` has none of the files `names`, which hold its `what`."""
    if not any((folder / name).is_file() for name in names):
        raise UserError(
            f"{folder} has no {what}: copy {' or '.join(names)} of the same repository into that folder"
        )


def _preprocess(pictures: Any, source: str) -> dict[str, Any]:
    """open_clip's `PreprocessCfg` fields of a `CLIPImageProcessor`."""
    size, crop = dict(pictures.size), dict(pictures.crop_size or {})
    sides = {side for side in (*size.values(), *(crop.values() if pictures.do_center_crop else ())) if side}
    is_plain = pictures.do_resize and pictures.do_rescale and pictures.do_normalize and len(sides) == 1
    is_squared = size.get("height") is not None
    if (
        not is_plain
        or not (is_squared or pictures.do_center_crop)
        or pictures.resample not in _INTERPOLATIONS
        or abs(pictures.rescale_factor * 255 - 1) > 1e-6
    ):
        raise UserError(
            f"{source}: its preprocessor_config.json asks for another preprocessing than resizing to one side, cropping "
            "the centre square of that side, and normalising; choose a CLIP that is prepared so"
        )
    return {
        "size": int(sides.pop()),
        "mode": "RGB",
        "mean": list(pictures.image_mean),
        "std": list(pictures.image_std),
        "interpolation": _INTERPOLATIONS[pictures.resample],
        "resize_mode": "squash" if is_squared else "shortest",
        "fill_color": 0,
    }
