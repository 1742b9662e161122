"""A CLIP that open_clip keeps: `MODEL/TAG`, or a folder in its local-dir form.

Legend: B batch, L tokens of a padded caption, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from training.pretrained import CLIP_CONFIG, CLIP_WEIGHTS, DAMAGED, WEIGHT_SUFFIXES, config_of, in_one_line


@dataclass(frozen=True)
class OpenClipTowers:
    """`clip_encoder.Towers` of an open_clip model; captions are padded to the context length."""

    model: nn.Module
    tokenizer: Any

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's `PreprocessCfg` fields, which it keeps with the checkpoint."""
        preprocess = dict(self.model.visual.preprocess_cfg)
        size = preprocess["size"]
        return {**preprocess, "size": size[0] if isinstance(size, list | tuple) else size}

    @property
    def embed_dim(self) -> int:
        """Width of both embeddings."""
        projection = _text_tower(self.model).text_projection
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def text_width(self) -> int:
        """Width of the text hidden states."""
        return _text_tower(self.model).token_embedding.embedding_dim

    @property
    def context_length(self) -> int:
        """The most tokens of a caption."""
        return self.tokenizer.context_length

    def tokens(self, captions: Sequence[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) int64 and how many of each row there are up to the end token (B,) int64, at most `max_tokens`."""
        cut = self.tokenizer(list(captions), context_length=max_tokens)
        tokens = F.pad(cut, (0, self.context_length - cut.shape[1]))
        return tokens, (tokens == self.tokenizer.eot_token_id).int().argmax(1) + 1

    def image(self, x: Tensor) -> Tensor:
        """(B, D) of preprocessed pictures."""
        return self.model.encode_image(x)

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D), and what the final norm puts out (B, L, W)."""
        captured: list[Tensor] = []
        hook = _text_tower(self.model).ln_final.register_forward_hook(
            lambda _m, _i, out: captured.append(out)
        )
        try:
            embeddings = self.model.encode_text(tokens)
        finally:
            hook.remove()
        return embeddings, captured[0]


def from_folder(folder: Path) -> OpenClipTowers:
    """The CLIP of a folder in open_clip's local-dir form. Raises UserError when it is incomplete."""
    import open_clip

    config = config_of(folder, CLIP_CONFIG)
    if not any(p.suffix in WEIGHT_SUFFIXES for p in folder.iterdir()):
        raise UserError(f"{folder} has no weights beside its {CLIP_CONFIG}: copy {CLIP_WEIGHTS} there")
    try:
        _require_own_text_tower(config["model_cfg"]["text_cfg"], str(folder))
        return _with_tokenizer(open_clip.create_model(f"local-dir:{folder}"))
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"no CLIP can be loaded from {folder} ({in_one_line(error)}): copy {CLIP_CONFIG} and {CLIP_WEIGHTS} there again"
        ) from error


def repository(name: str) -> str:
    """The hub repository of open_clip's `MODEL/TAG`. Raises UserError when it knows none."""
    import open_clip

    model, _, tag = name.rpartition("/")
    if tag not in open_clip.list_pretrained_tags_by_model(model):
        raise UserError(
            f"{name!r} is neither a folder nor a MODEL/TAG that open_clip knows, nor OWNER/NAME of a hub repository: "
            f"give a folder with {CLIP_CONFIG} and weights, or a name such as ViT-L-14/openai"
        )
    _require_own_text_tower(open_clip.get_model_config(model)["text_cfg"], name)
    return open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")


def knows(model: str) -> bool:
    """Whether open_clip has an architecture of that name."""
    import open_clip

    return model in open_clip.list_models()


def _require_own_text_tower(text_cfg: dict[str, Any], source: str) -> None:
    if "hf_model_name" in text_cfg or "hf_tokenizer_name" in text_cfg:
        raise UserError(
            f"{source} needs a Hugging Face text tower or tokenizer; choose a CLIP with open_clip's own, such as ViT-L-14"
        )


def _with_tokenizer(model: nn.Module) -> OpenClipTowers:
    from open_clip.tokenizer import SimpleTokenizer

    length = _text_tower(model).positional_embedding.shape[0]
    return OpenClipTowers(model, SimpleTokenizer(context_length=length))


def _text_tower(model: nn.Module) -> Any:
    return model if hasattr(model, "token_embedding") else model.text
