"""A frozen T5 text encoder: hidden states of captions and nothing else.

Legend: B captions, W text width, T tokens of one caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from data.config import Config
from data.errors import UserError
from training import hub
from training.pretrained import (
    DAMAGED,
    DTYPES,
    Precision,
    config_of,
    frozen,
    in_one_line,
    local_folder,
    require_safetensors,
    transformers_model,
)
from training.transformers_towers import padded_tokens, require_any

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


class T5Config(Config):
    """Which T5 reads captions; it is never trained."""

    pretrained: str | None = Field(
        None, description="a folder of transformers with a T5, or a hub name; None: no T5 reads the captions"
    )


@dataclass(frozen=True)
class T5Encoder:
    """The encoder half of a frozen T5 with its tokenizer."""

    model: Any
    tokenizer: Any
    max_length: int
    """Longer captions are cut to that many tokens, the last of which is the end token."""

    @classmethod
    def load(
        cls,
        source: str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        max_length: int = 256,
    ) -> T5Encoder:
        """The encoder of `source`: a folder of transformers whose config.json has `model_type` t5, or a hub name.

        In fp16 the layers that overflow stay in fp32, as transformers has it. Raises UserError when the folder is
        incomplete or holds something else, or when the weights cannot be downloaded.
        """
        folder = local_folder(source) or hub.folder(source, "t5")
        _require_t5(folder)
        model, tokenizer = _loaded(folder, precision)
        return cls(frozen(model, device), tokenizer, max_length)

    @property
    def text_width(self) -> int:
        """W, the width of the hidden states."""
        return self.model.config.d_model

    @torch.inference_mode()
    def ragged_text(self, captions: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Last hidden states of all captions (sum of T, W) float32, in order and without padding, and each T.

        The states come after the final norm; the last one of a caption is the end token's. One forward pass, as long as
        the longest caption.
        """
        tokens, lengths = padded_tokens(self.tokenizer, captions, self.max_length)
        kept = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, L)
        device = self.model.device
        states = self.model(
            input_ids=tokens.to(device, non_blocking=True),
            attention_mask=kept.to(device, torch.long, non_blocking=True),
        ).last_hidden_state
        rows = kept.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        return states.flatten(0, 1).index_select(0, rows).float(), lengths.tolist()

    def text(self, captions: Sequence[str], batch_size: int = 64) -> list[Tensor]:
        """Per caption its last hidden states (T, W) float32, on the CPU, in the order of `captions`.

        Captions of like length share a batch, so that little padding is computed: padding is masked, hence the states of
        a caption are the same but for rounding whatever it shares a batch with.
        """
        lengths = padded_tokens(self.tokenizer, captions, self.max_length)[1].tolist() if captions else []
        states: list[Tensor] = [torch.empty(0)] * len(captions)
        for rows in by_length(lengths, batch_size):
            values, counts = self.ragged_text([captions[row] for row in rows])
            for row, caption_states in zip(rows, values.cpu().split(counts), strict=True):
                states[row] = caption_states
        return states


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All indices of `lengths` in batches of like length, the longest first: what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _require_t5(folder: Path) -> None:
    kind = config_of(folder).get("model_type")
    if kind != "t5":
        raise UserError(f"{folder} holds a model of type {kind}: give a folder of transformers with a T5")
    require_safetensors(folder, "transformers T5")
    require_any(folder, "tokenizer", TOKENIZER_FILES)


def _loaded(folder: Path, precision: Precision) -> tuple[Any, Any]:
    import transformers

    here = {"local_files_only": True}
    try:
        model = transformers_model(
            transformers.T5EncoderModel, folder, use_safetensors=True, dtype=DTYPES[precision]
        )
        return model, transformers.AutoTokenizer.from_pretrained(folder, **here, padding_side="right")
    except UserError:
        raise
    except (*DAMAGED, ImportError) as error:
        raise UserError(
            f"no T5 can be loaded from {folder} ({in_one_line(error)}): copy config.json, tokenizer.json, "
            "tokenizer_config.json and the *.safetensors weights of its repository there again"
        ) from error
