"""A frozen CLIP, kept by open_clip or by transformers, with its own tokenizer and preprocessing.

Legend: B batch, H W pixels, D embedding width, W text width, L tokens of a padded caption, T of one without padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import hub, open_clip_towers, transformers_towers
from training.pixels import preprocessed
from training.pretrained import DTYPES, Precision, frozen, is_open_clip, local_folder, require_uint8

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Towers(Protocol):
    """Both networks of a CLIP and its tokenizer, alike whichever library keeps them."""

    @property
    def model(self) -> nn.Module:
        """The module that holds both networks."""
        ...

    @property
    def preprocess(self) -> dict[str, Any]:
        """What `pixels.preprocessed` reads: size, mean, std, interpolation, resize_mode, fill_color."""
        ...

    @property
    def embed_dim(self) -> int:
        """D."""
        ...

    @property
    def text_width(self) -> int:
        """W."""
        ...

    @property
    def context_length(self) -> int:
        """The largest L."""
        ...

    def tokens(self, captions: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64, at most `max_tokens` of them no padding, and how many that are (B,) int64."""
        ...

    def image(self, x: Tensor) -> Tensor:
        """(B, D) of preprocessed pictures."""
        ...

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), and the last hidden states after the final norm (B, L, W)."""
        ...


@dataclass(frozen=True)
class ClipEncoder:
    """A frozen CLIP with its tokenizer and its own preprocessing."""

    towers: Towers

    @classmethod
    def load(
        cls, source: str, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> ClipEncoder:
        """The encoder of `source`.

        An open_clip `MODEL/TAG`; a folder in open_clip's local-dir form; a folder of transformers whose config.json has
        `model_type` clip; or the hub name `OWNER/NAME` of one. A name may end in `@REVISION`. Raises UserError when the folder is incomplete, the name
        is unknown, or its weights cannot be downloaded.
        """
        towers = _towers(source, precision)
        frozen(towers.model.to(DTYPES[precision]), device)
        return cls(towers)

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's `PreprocessCfg` fields: size, mean, std, interpolation, resize_mode, fill_color."""
        return self.towers.preprocess

    @property
    def embed_dim(self) -> int:
        """D, the width of both embeddings."""
        return self.towers.embed_dim

    @property
    def text_width(self) -> int:
        """W, the width of the text hidden states."""
        return self.towers.text_width

    @property
    def context_length(self) -> int:
        """The most tokens that a caption can have, start and end included."""
        return self.towers.context_length

    @property
    def image_size(self) -> int:
        """Side of the images that the network sees, in pixels."""
        return int(self.preprocess["size"])

    @torch.inference_mode()
    def image(self, pixels: Tensor | Sequence[Tensor]) -> Tensor:
        """Image embeddings (B, D) float32, L2-normalised, of `pixels` (B, 3, H, W) uint8 of any size.

        Pictures of different sizes come as a sequence of (3, H, W) and go through the network in one pass.
        """
        if isinstance(pixels, Tensor):
            return F.normalize(self.towers.image(self._prepared(pixels)).float(), dim=-1)
        prepared = torch.cat([self._prepared(picture[None]) for picture in pixels])
        return F.normalize(self.towers.image(prepared).float(), dim=-1)

    @torch.inference_mode()
    def ragged_text(
        self, captions: Sequence[str], max_tokens: int | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Text embeddings (B, D) float32, L2-normalised; hidden states of all captions (sum of T, W) float32; each T.

        The states come after the final norm and run from the start token to the end token. Longer captions are cut to
        `max_tokens` tokens, by default `context_length`, the last of which is the end token.
        """
        tokens, lengths = self.towers.tokens(captions, max_tokens)
        kept = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, L), on the host: no wait for the device
        rows = kept.flatten().nonzero().squeeze(1).to(self._device, non_blocking=True)
        embeddings, states = self.towers.text(tokens.to(self._device, non_blocking=True))
        values = states.flatten(0, 1).index_select(0, rows).float()
        return F.normalize(embeddings.float(), dim=-1), values, lengths.tolist()

    def text(self, captions: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Text embeddings (B, D) as `ragged_text` gives them, and per caption its hidden states (T, W) float32."""
        embeddings, values, lengths = self.ragged_text(captions, max_tokens)
        return embeddings, list(values.split(lengths))

    def _prepared(self, pixels: Tensor) -> Tensor:
        require_uint8(pixels)
        moved = pixels.to(self._device, non_blocking=True)
        return preprocessed(moved, self.preprocess).to(next(self.towers.model.parameters()).dtype)

    @property
    def _device(self) -> torch.device:
        return next(self.towers.model.parameters()).device


def _towers(source: str, precision: Precision) -> Towers:
    folder = local_folder(source) or downloaded(source)
    if is_open_clip(folder):
        return open_clip_towers.from_folder(folder)
    return transformers_towers.load(folder, DTYPES[precision])


def downloaded(source: str) -> Path:
    """The folder of a `MODEL/TAG` or a hub name. Raises UserError when it is neither, or cannot be downloaded."""
    name, _, revision = source.partition("@")
    if _HUB_NAME.fullmatch(name) and not open_clip_towers.knows(name.split("/")[0]):
        return hub.folder(source, "clip")
    repository = open_clip_towers.repository(name)
    place = f"{repository}@{revision}" if revision else repository
    return hub.folder(place, "open_clip", called=source)
