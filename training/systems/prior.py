"""The prior: text embedding -> image embedding, by diffusion on CLIP vectors (Ramesh et al. 2022, arXiv 2204.06125, 2.2).

Legend: B batch, D embedding width, T tokens of the dataset's longest caption.
It predicts x_0 of widened, standardised image embeddings; `clip_mean` and `clip_std` in the module undo that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from data.errors import UserError
from training.diffusion.objective import Objective, per_sample_mse
from training.diffusion.sampling import dpm_solver
from training.randomness import Draws
from training.systems.embeddings import chosen, padded, resident, token_mask, widened, widened_statistics
from training.systems.system import Batch, Columns, TrainConfig

OBJECTIVE = Objective("sample", "squaredcos_cap_v2")


class PriorConfig(TrainConfig):
    """A `PriorTransformer` and how it is trained."""

    num_layers: int = Field(3, ge=1, description="transformer blocks")
    num_attention_heads: int = Field(4, ge=1, description="attention heads")
    attention_head_dim: int = Field(
        32, ge=2, description="width of a head; heads x this is the transformer's width"
    )
    text_drop: float = Field(
        0.1, ge=0, lt=1, description="share of samples trained with the empty caption, for guidance"
    )


@dataclass(frozen=True)
class Prior:
    """The trainable of the prior."""

    config: PriorConfig
    embed_dim: int
    tokens: int
    mean: Tensor
    """(D,) of the widened image embeddings; `std` likewise."""
    std: Tensor
    empty_emb: Tensor
    """(1, D) text embedding of the empty caption."""
    empty_hidden: Tensor
    """(1, T, D), zero after `empty_length` (1,) tokens."""
    empty_length: Tensor
    columns: tuple[str, ...] = field(default=("img_emb", "text_emb", "text_hidden"))

    def build(self) -> nn.Module:
        """A diffusers `PriorTransformer` that knows the statistics of the embeddings."""
        from diffusers import PriorTransformer

        model = PriorTransformer(
            num_attention_heads=self.config.num_attention_heads,
            attention_head_dim=self.config.attention_head_dim,
            num_layers=self.config.num_layers,
            embedding_dim=self.embed_dim,
            num_embeddings=self.tokens,
            embedding_proj_norm_type="layer",  # a CLIP embedding's length, which pipelines leave as it is, drops out
        )
        model.clip_mean.requires_grad_(False).copy_(self.mean)
        model.clip_std.requires_grad_(False).copy_(self.std)
        return model

    def timesteps(self, draws: Draws) -> Tensor:
        """The timesteps (B,) that training draws for these samples."""
        return OBJECTIVE.timesteps(draws.uniform("prior.timestep"), draws.normal("prior.timestep"))

    def loss(self, model: nn.Module, batch: Batch, draws: Draws, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted clean embedding: (B,) float32."""
        device = batch["img_emb"].device
        x0 = (widened(batch["img_emb"]) - resident(self.mean, device)) / resident(self.std, device)
        t = self.timesteps(draws) if t is None else t
        x_t = OBJECTIVE.noised(x0, draws.normal("prior.noise", x0.shape[1:]), t)
        drop = draws.uniform("prior.text_drop") < self.config.text_drop
        lengths = chosen(drop, resident(self.empty_length, device), batch["text_length"])
        output = network(model)(
            x_t,
            t,
            text_emb=chosen(drop, resident(self.empty_emb, device), batch["text_emb"]),
            text_hidden=chosen(drop, resident(self.empty_hidden, device), batch["text_hidden"]),
            text_mask=token_mask(lengths, self.tokens),
        )
        return per_sample_mse(output, x0)

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Writes diffusers' `prior/` and `prior_scheduler/` under `folder`."""
        model.save_pretrained(folder / "prior", safe_serialization=True)
        dpm_solver(OBJECTIVE).save_pretrained(folder / "prior_scheduler")
        return {"embed_dim": self.embed_dim, "tokens": self.tokens}


def fit(config: PriorConfig, columns: Columns) -> Prior:
    """The trainable with the dataset's sizes and statistics. Raises UserError when CLIP's two widths differ."""
    (embed_dim,), (tokens, width) = columns.shape("img_emb"), columns.shape("text_hidden")
    if width != embed_dim:
        raise UserError(
            f"CLIP has embeddings of {embed_dim} and text states of {width}; PriorTransformer needs them equal: "
            "set clip.text_width to clip.embed_dim, or choose a CLIP such as ViT-L-14"
        )
    mean, std = widened_statistics(columns)
    hidden, length = padded([torch.from_numpy(columns.empty("text_hidden"))], tokens)
    empty_emb = torch.from_numpy(columns.empty("text_emb"))[None]
    return Prior(config, embed_dim, tokens, mean, std, empty_emb, hidden, length)


def network(model: nn.Module) -> Callable[..., Tensor]:
    """`model` as the maths calls it: (x_t (B, D), t, text_emb=(B, D) unit, text_hidden=(B, T, D), text_mask=(B, T))."""

    def predict(
        x_t: Tensor, t: Tensor, *, text_emb: Tensor, text_hidden: Tensor, text_mask: Tensor
    ) -> Tensor:
        return model(
            x_t,
            t,
            proj_embedding=widened(text_emb),
            encoder_hidden_states=text_hidden,
            attention_mask=text_mask,
            return_dict=False,
        )[0]

    return predict
