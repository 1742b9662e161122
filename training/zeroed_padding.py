"""A CLIP text model whose states on padding reach a U-Net as zeros, which is what the denoiser is trained on.

A `diffusers` pipeline hands its U-Net the text encoder's states of the padding too. Here padding has a token of its own that
is large in features which no other token has. The features say what is padding; the U-Net's `encoder_hid_proj` takes its
states off. Nothing else changes: all other tokens' states are CLIP's.

Legend: W text width, E extra features, one attention head of them. Feature W is `INDICATOR`, +1 on padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PADDING_TOKEN = "<|padding|>"
_LOUD = 2.0**15
"""Of the padding token's two extra features, one of either sign; float16 and bfloat16 hold it exactly."""
_ROUTE, _SHUT = 20.0, 1000.0
"""How strongly padding attends to padding alone, and how strongly its hidden units are held at zero."""


@torch.no_grad()
def with_padding_token(text_model: Any, tokenizer: Any) -> Any:
    """A `CLIPTextModel` of width W + E with the states of `text_model` in its first W features; changes `tokenizer`.

    `text_model` is a `CLIPTextModel`. On padding the first W features hold the final norm's bias, feature W holds 1 and is 0
    on every other token, the rest are 0. Padding behind a caption changes none of its states.
    """
    from transformers import CLIPTextModel

    tokenizer.add_special_tokens({"pad_token": PADDING_TOKEN})
    config = text_model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    wide = CLIPTextModel(_wider(config, head, tokenizer.pad_token_id)).eval().requires_grad_(False)
    for parameter in wide.parameters():
        parameter.zero_()
    embeddings, kept = wide.embeddings, text_model.embeddings
    embeddings.token_embedding.weight[: config.vocab_size, :width] = _centred(kept.token_embedding.weight)
    embeddings.position_embedding.weight[:, :width] = _centred(kept.position_embedding.weight)
    padding = embeddings.token_embedding.weight[tokenizer.pad_token_id]
    padding.zero_()[width : width + 2] = torch.tensor([_LOUD, -_LOUD])
    for layer, original in zip(wide.encoder.layers, text_model.encoder.layers, strict=True):
        _widen_layer(layer, original, width)
    _widen_norm(wide.final_layer_norm, text_model.final_layer_norm, width)
    wide.final_layer_norm.weight[width] = 1 / _loudness(wide)
    padding[:width] -= _stream_on_padding(wide, tokenizer)[:width]
    return wide


@torch.no_grad()
def with_padding_taken_off(unet: Any, text_encoder: Any) -> Any:
    """`unet` behind a linear map of W + E features to W: the first W, less the final norm's bias where INDICATOR is 1."""
    from diffusers import UNet2DConditionModel

    width = unet.config.cross_attention_dim
    wide = text_encoder.config.hidden_size
    config = {**unet.config, "encoder_hid_dim": wide, "encoder_hid_dim_type": "text_proj"}
    behind = UNet2DConditionModel.from_config(config)
    projection = nn.Linear(wide, width)
    projection.weight.zero_()
    projection.weight[:, :width] = torch.eye(width)
    projection.weight[:, width] = -text_encoder.final_layer_norm.bias[:width]
    projection.bias.zero_()
    ours = {f"encoder_hid_proj.{name}": w for name, w in projection.state_dict().items()}
    behind.load_state_dict({name: w.cpu() for name, w in unet.state_dict().items()} | ours)
    return behind.eval().requires_grad_(False)


def _wider(config: Any, head: int, padding: int) -> Any:
    from transformers import CLIPTextConfig

    width = config.hidden_size
    changed = {
        "vocab_size": max(config.vocab_size, padding + 1),
        "hidden_size": width + head,
        "num_attention_heads": config.num_attention_heads + 1,
        "layer_norm_eps": config.layer_norm_eps * width / (width + head),
        "pad_token_id": padding,
    }
    return CLIPTextConfig(**{**config.to_dict(), **changed})


def _widen_layer(layer: Any, original: Any, width: int) -> None:
    _widen_norm(layer.layer_norm1, original.layer_norm1, width)
    _widen_norm(layer.layer_norm2, original.layer_norm2, width)
    loud = ((layer.layer_norm1.weight.shape[0]) / 2) ** 0.5
    for name in ("layer_norm1", "layer_norm2"):
        getattr(layer, name).weight[width] = 1 / loud  # padding's extra feature becomes 1
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = getattr(layer.self_attn, name), getattr(original.self_attn, name)
        ours.weight[:width, :width], ours.bias[:width] = theirs.weight, theirs.bias
    layer.self_attn.q_proj.weight[:width, width] = _ROUTE
    layer.self_attn.k_proj.weight[:width, width] = _ROUTE
    ours, theirs = layer.self_attn.out_proj, original.self_attn.out_proj
    ours.weight[:width, :width], ours.bias[:width] = _centred(theirs.weight.T).T, _centred(theirs.bias)
    layer.mlp.fc1.weight[:, :width], layer.mlp.fc1.bias[:] = original.mlp.fc1.weight, original.mlp.fc1.bias
    layer.mlp.fc1.weight[:, width] = -_SHUT
    layer.mlp.fc2.weight[:width] = _centred(original.mlp.fc2.weight.T).T
    layer.mlp.fc2.bias[:width] = _centred(original.mlp.fc2.bias)


def _widen_norm(norm: nn.LayerNorm, original: nn.LayerNorm, width: int) -> None:
    """Over a centred stream with E zeros behind it the variance is W / (W + E) of what it was; the weights take that up."""
    norm.weight[:width] = original.weight * (width / norm.weight.shape[0]) ** 0.5
    norm.bias[:width] = original.bias


def _centred(x: Tensor) -> Tensor:
    """`x` less its mean over the last axis: norms see no difference, since they take the mean off themselves."""
    return x - x.mean(-1, keepdim=True)


def _loudness(wide: Any) -> float:
    return (wide.config.hidden_size / 2) ** 0.5


def _stream_on_padding(wide: Any, tokenizer: Any) -> Tensor:
    """(W + E,): what the layers leave on padding before the final norm, mean over positions; the same for every caption."""
    captured: list[Tensor] = []
    hook = wide.final_layer_norm.register_forward_pre_hook(lambda _m, inputs: captured.append(inputs[0]))
    tokens = tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    wide(tokens)
    hook.remove()
    is_padding = tokens[0] == tokenizer.pad_token_id
    return captured[0][0, is_padding].mean(0) if is_padding.any() else torch.zeros_like(captured[0][0, 0])
