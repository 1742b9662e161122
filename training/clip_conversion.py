"""A frozen CLIP of any library as the `transformers` models, tokenizer and picture processor that pipelines load.

What open_clip keeps is renamed and then compared with the original on real inputs, so that a tower which transformers
cannot express is refused instead of exported wrong. Legend: B batch, L tokens, W width of a tower, D embedding width.
"""

from __future__ import annotations

import gzip
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError
from training.clip_encoder import ClipEncoder
from training.open_clip_towers import OpenClipTowers

PROBES = ("", "a photo of a cat, and of 2 dogs", "stars")
TOLERANCE = 1e-3
"""Largest difference of unit embeddings between a tower and its conversion; rounding stays under 1e-5."""
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


@torch.no_grad()
def text_model(clip: ClipEncoder) -> Any:
    """The text tower as a `CLIPTextModelWithProjection`. Raises UserError when transformers cannot express it."""
    from transformers import CLIPTextModelWithProjection

    towers = clip.towers
    if not isinstance(towers, OpenClipTowers):
        model = CLIPTextModelWithProjection(towers.model.config.text_config)
        return _loaded("text", model, _parts(towers.model, "text_model", "text_projection"))
    source: Any = towers.model if hasattr(towers.model, "token_embedding") else towers.model.text
    model = CLIPTextModelWithProjection(_text_config(clip, source))
    weights = _blocks("text", source.transformer) | {
        "text_model.embeddings.token_embedding.weight": source.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": source.positional_embedding,
        "text_model.final_layer_norm.weight": source.ln_final.weight,
        "text_model.final_layer_norm.bias": source.ln_final.bias,
        "text_projection.weight": _projection(source.text_projection),
    }
    model = _loaded("text", model, weights)
    tokens, lengths = towers.tokens(PROBES)
    output = model(tokens)
    embeddings, states = towers.text(tokens)
    is_token = torch.arange(tokens.shape[1]) < lengths[:, None]
    _require_equal("text", output.text_embeds, embeddings)
    _require_equal("text", output.last_hidden_state[is_token], states[is_token])
    return model


@torch.no_grad()
def vision_model(clip: ClipEncoder) -> Any:
    """The vision tower as a `CLIPVisionModelWithProjection`. Raises UserError when transformers cannot express it."""
    from transformers import CLIPVisionModelWithProjection

    towers = clip.towers
    if not isinstance(towers, OpenClipTowers):
        model = CLIPVisionModelWithProjection(towers.model.config.vision_config)
        return _loaded("vision", model, _parts(towers.model, "vision_model", "visual_projection"))
    source: Any = towers.model.visual
    if not all(hasattr(source, part) for part in ("conv1", "class_embedding", "transformer", "ln_post")):
        raise UserError(_cannot("vision", "it is no plain vision transformer"))
    model = CLIPVisionModelWithProjection(_vision_config(clip, source))
    weights = _blocks("vision", source.transformer) | {
        "vision_model.embeddings.class_embedding": source.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": source.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": source.positional_embedding,
        "vision_model.pre_layrnorm.weight": getattr(source.ln_pre, "weight", None),
        "vision_model.pre_layrnorm.bias": getattr(source.ln_pre, "bias", None),
        "vision_model.post_layernorm.weight": source.ln_post.weight,
        "vision_model.post_layernorm.bias": source.ln_post.bias,
        "visual_projection.weight": _projection(source.proj),
    }
    model = _loaded("vision", model, weights)
    x = torch.linspace(-1, 1, 2 * 3 * clip.image_size**2).view(2, 3, clip.image_size, clip.image_size).sin()
    _require_equal("vision", model(x).image_embeds, towers.image(x))
    return model


def tokenizer(clip: ClipEncoder, max_tokens: int) -> Any:
    """A `CLIPTokenizer` that cuts captions to `max_tokens`, the end token kept, and pads with the end token.

    open_clip's vocabulary gives open_clip's tokens of every text that `ftfy` and `html.unescape` leave as it is.
    """
    from transformers import CLIPTokenizer

    towers = clip.towers
    if isinstance(towers, OpenClipTowers):
        vocabulary, merges = _open_clip_vocabulary()
        return CLIPTokenizer(vocabulary, merges, model_max_length=max_tokens)
    kept: Any = towers
    converted = CLIPTokenizer.from_pretrained(kept.tokenizer.name_or_path, padding_side="right")
    converted.model_max_length = max_tokens
    return converted


def picture_processor(clip: ClipEncoder) -> Any:
    """The `CLIPImageProcessor` of the vision tower's own preprocessing. Raises UserError where it has no such rule."""
    from transformers import CLIPImageProcessor

    preprocess, side = clip.preprocess, clip.image_size
    if preprocess["resize_mode"] == "longest" or preprocess["interpolation"] not in _RESAMPLE:
        raise UserError(
            _cannot("vision", f"its pictures are resized by {preprocess['resize_mode']!r}, "
                    f"{preprocess['interpolation']!r}, which CLIPImageProcessor does not know")
        )  # fmt: skip
    is_squashed = preprocess["resize_mode"] == "squash"
    square = {"height": side, "width": side}
    return CLIPImageProcessor(
        size=square if is_squashed else {"shortest_edge": side},
        crop_size=square,
        resample=_RESAMPLE[preprocess["interpolation"]],
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )


def _text_config(clip: ClipEncoder, source: Any) -> Any:
    from transformers import CLIPTextConfig

    first = source.transformer.resblocks[0]
    tokens, width = source.token_embedding.weight.shape
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        max_position_embeddings=clip.context_length,
        projection_dim=clip.embed_dim,
        pad_token_id=tokens - 1,
        **_block_config(first, len(source.transformer.resblocks)),
    )


def _vision_config(clip: ClipEncoder, source: Any) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=source.conv1.out_channels,
        image_size=clip.image_size,
        patch_size=source.conv1.kernel_size[0],
        projection_dim=clip.embed_dim,
        **_block_config(source.transformer.resblocks[0], len(source.transformer.resblocks)),
    )


def _block_config(block: Any, layers: int) -> dict[str, Any]:
    if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
        raise UserError(_cannot("text and vision", f"its blocks are {type(block).__name__}"))
    return {
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": layers,
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _ACTIVATIONS[type(block.mlp.gelu).__name__],
        "layer_norm_eps": block.ln_1.eps,
    }


def _blocks(tower: str, transformer: Any) -> dict[str, Tensor]:
    weights = {}
    for i, block in enumerate(transformer.resblocks):
        place, state = f"{tower}_model.encoder.layers.{i}", block.state_dict()
        for kind in ("weight", "bias"):
            for name, theirs in _BLOCK.items():
                weights[f"{place}.{theirs}.{kind}"] = state.pop(f"{name}.{kind}")
            parts = state.pop(f"attn.in_proj_{kind}").chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                weights[f"{place}.self_attn.{name}_proj.{kind}"] = part
        if state:
            raise UserError(_cannot(tower, f"its blocks have {', '.join(state)}"))
    return weights


def _projection(projection: Any) -> Tensor | None:
    return projection.weight if isinstance(projection, nn.Linear) else projection.T


def _parts(model: nn.Module, *prefixes: str) -> dict[str, Tensor]:
    return {name: w for name, w in model.state_dict().items() if name.split(".")[0] in prefixes}


def _loaded(tower: str, model: nn.Module, weights: dict[str, Any]) -> Any:
    kept = {name: w.detach().float() for name, w in weights.items() if w is not None}
    if missing := sorted(set(model.state_dict()) - set(kept)):
        raise UserError(_cannot(tower, f"it has no {missing[0]}"))
    model.load_state_dict(kept)
    return model.eval().requires_grad_(False)


def _require_equal(tower: str, converted: Tensor, original: Tensor) -> None:
    unit = [nn.functional.normalize(x.float(), dim=-1) for x in (converted, original)]
    worst = float((unit[0] - unit[1]).abs().max())
    if not worst < TOLERANCE:
        raise UserError(_cannot(tower, f"as a transformers model it answers differently, by {worst:.2g}"))


def _cannot(tower: str, why: str) -> str:
    return (
        f"the {tower} tower of this CLIP cannot be exported: {why}. Exported are vision transformers with a class token and "
        "causal text transformers, such as ViT-L-14, and every CLIP that transformers keeps"
    )


def _open_clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """open_clip's bundled byte-pair vocabulary, its two special tokens under transformers' names, and its merges."""
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    own = SimpleTokenizer(default_bpe())
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    with gzip.open(default_bpe()) as file:
        assert file.readline().startswith(b'"bpe_simple_vocab')
    return {names.get(token, token): index for token, index in own.encoder.items()}, list(own.bpe_ranks)
