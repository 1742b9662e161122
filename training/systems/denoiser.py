"""The latent denoiser: a U-Net conditioned on a noise-augmented image embedding and on the caption.

Legend: B batch, D embedding width, T tokens of the dataset's longest caption, W text width, C latent channels, h w latent size.
The image embedding enters as in diffusers' `StableUnCLIPPipeline`: noised, its noise level's embedding appended, through
the class-embedding projection; the caption's hidden states enter by cross-attention, zero-padded, without a mask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from data.errors import DarkroomError
from training.diffusion.objective import NUM_TRAIN_TIMESTEPS, Objective, denoiser, noised, per_sample_mse
from training.diffusion.sampling import dpm_solver, sample
from training.pixels import to_uint8
from training.randomness import Draws
from training.systems.embeddings import chosen, padded, resident, widened, widened_statistics
from training.systems.system import Batch, Columns, TrainConfig
from training.vae_encoder import VaeEncoder

log = logging.getLogger("darkroom.denoiser")

AUGMENTATION = Objective("epsilon", "squaredcos_cap_v2")
"""The noising path of the image embedding; its network is the denoiser itself, so nothing predicts on it."""

SAMPLE_STEPS = 10


class DenoiserConfig(TrainConfig):
    """A `UNet2DConditionModel`, its objective and its condition drops."""

    block_out_channels: tuple[int, ...] = Field(
        (64, 128), min_length=1, description="channels per resolution; each after the first halves the side"
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks per resolution")
    num_attention_heads: tuple[int, ...] | int = Field(
        4, description="attention heads, over all or per resolution"
    )
    attention_levels: tuple[bool, ...] | None = Field(
        None,
        description="which resolutions have self- and cross-attention; None: all but the lowest, or all if it is alone",
    )
    norm_num_groups: int = Field(
        16, ge=1, description="groups of the group norms; divides every channel count"
    )
    time_scale_shift: bool = Field(
        False,
        description="time and image embedding scale features as well as shift them; learns sooner when tiny",
    )
    prediction_type: str = Field(
        "flow", pattern="^(epsilon|sample|v_prediction|flow)$", description="what the network predicts"
    )
    noise_schedule: str = Field(
        "scaled_linear",
        pattern="^(squaredcos_cap_v2|scaled_linear|linear)$",
        description="the variance-preserving path of all but flow",
    )
    zero_terminal_snr: bool = Field(
        False, description="rescale the schedule so that the last timestep is pure noise"
    )
    logit_mean: float = Field(
        0.0,
        description="of the flow's logit-normal timesteps; small pictures settle their layout at more noise: raise it",
    )
    logit_std: float = Field(1.0, gt=0, description="of the flow's logit-normal timesteps")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="cap of the signal-to-noise weight; None: no weighting"
    )
    image_drop: float = Field(
        0.1, ge=0, lt=1, description="share of samples without image embedding and caption"
    )
    caption_drop: float = Field(
        0.5, ge=0, le=1, description="share of samples without caption, those of image_drop included"
    )
    max_noise_level: int = Field(
        NUM_TRAIN_TIMESTEPS,
        ge=1,
        le=NUM_TRAIN_TIMESTEPS,
        description="image embeddings are noised to levels below this",
    )

    @model_validator(mode="after")
    def _consistent(self) -> DenoiserConfig:
        if self.caption_drop < self.image_drop:
            raise ValueError(
                f"caption_drop {self.caption_drop} is below image_drop {self.image_drop}: samples without image embedding "
                "have no caption either, so raise it"
            )
        levels = len(self.block_out_channels)
        if self.attention_levels is not None and len(self.attention_levels) != levels:
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} entries for {levels} resolutions"
            )
        self.objective()
        return self

    def objective(self) -> Objective:
        """What the network predicts, and on which path."""
        return Objective(
            self.prediction_type, self.noise_schedule, self.zero_terminal_snr, self.logit_mean, self.logit_std
        )


@dataclass(frozen=True)
class Denoiser:
    """The trainable of the latent denoiser."""

    config: DenoiserConfig
    latent_shape: tuple[int, int, int]
    scaling_factor: float
    embed_dim: int
    text_width: int
    mean: Tensor
    """(D,) of the widened image embeddings; `std` likewise."""
    std: Tensor
    empty_hidden: Tensor
    """(1, T, W) states of the empty caption, zero-padded."""
    vae: str | None = None
    """Folder or hub name of the VAE that made the latents: what shows pictures of them."""
    columns: tuple[str, ...] = field(default=("vae_moments", "img_emb", "text_hidden"))

    def build(self) -> nn.Module:
        """A diffusers `UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        attends = _attention_levels(self.config)
        return UNet2DConditionModel(
            sample_size=self.latent_shape[1],
            in_channels=self.latent_shape[0],
            out_channels=self.latent_shape[0],
            block_out_channels=self.config.block_out_channels,
            layers_per_block=self.config.layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            norm_num_groups=self.config.norm_num_groups,
            cross_attention_dim=self.text_width,
            attention_head_dim=self.config.num_attention_heads,  # diffusers' U-Net reads a number of heads here
            resnet_time_scale_shift="scale_shift" if self.config.time_scale_shift else "default",
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * self.embed_dim,
        )

    def timesteps(self, draws: Draws) -> Tensor:
        """The timesteps (B,) that training draws for these samples."""
        return self.config.objective().timesteps(
            draws.uniform("denoiser.timestep"), draws.normal("denoiser.timestep")
        )

    def loss(self, model: nn.Module, batch: Batch, draws: Draws, t: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted quantity, Min-SNR-weighted where configured: (B,) float32."""
        objective = self.config.objective()
        x0 = self._latents(batch["vae_moments"], draws)
        noise = draws.normal("denoiser.noise", x0.shape[1:])
        t = self.timesteps(draws) if t is None else t
        output = network(model)(objective.noised(x0, noise, t), t.floor(), **self._conditioning(batch, draws))
        loss = per_sample_mse(output, objective.target(x0, noise, t))
        gamma = self.config.min_snr_gamma
        return loss if gamma is None else loss * objective.min_snr_weights(t, gamma)

    def sample(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Pictures made for the batch's conditions: (B, 3, H, W) uint8.

        Where the VAE is not to be had any more, the first three channels of the latents, ±2 deviations of noise wide: layout
        and edges show in these too.
        """
        objective = self.config.objective()
        conditioning = self._conditioning(batch, draws, drop=False)
        x_t = draws.normal("denoiser.sample", self.latent_shape)
        solver = dpm_solver(objective, prediction_type="sample")
        latents = sample(denoiser(network(model), objective), solver, x_t, SAMPLE_STEPS, **conditioning)
        if vae := _vae(self.vae, str(latents.device)):
            return vae.decode(latents / self.scaling_factor)
        shown = latents[:, [min(c, self.latent_shape[0] - 1) for c in range(3)]]
        return to_uint8(shown / 2)

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Writes diffusers' `unet/`, `scheduler/`, `image_normalizer/` and `image_noising_scheduler/` under `folder`."""
        from diffusers import DDPMScheduler
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

        normalizer = StableUnCLIPImageNormalizer(self.embed_dim)
        normalizer.mean.data.copy_(self.mean)
        normalizer.std.data.copy_(self.std)
        model.save_pretrained(folder / "unet", safe_serialization=True)
        normalizer.save_pretrained(folder / "image_normalizer", safe_serialization=True)
        DDPMScheduler(beta_schedule=AUGMENTATION.noise_schedule).save_pretrained(
            folder / "image_noising_scheduler"
        )
        dpm_solver(self.config.objective()).save_pretrained(folder / "scheduler")
        return {
            "scaling_factor": self.scaling_factor,
            "latent_shape": list(self.latent_shape),
            "tokens": self.empty_hidden.shape[1],
            "prediction_type": self.config.prediction_type,
            "noise_schedule": self.config.noise_schedule,
            "zero_terminal_snr": self.config.zero_terminal_snr,
        }

    def _latents(self, moments: Tensor, draws: Draws) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        noise = draws.normal("denoiser.posterior", mean.shape[1:])
        return self.scaling_factor * (mean + (0.5 * logvar).exp() * noise)

    def _conditioning(self, batch: Batch, draws: Draws, *, drop: bool = True) -> dict[str, Tensor]:
        device = batch["img_emb"].device
        level = draws.integers("denoiser.noise_level", self.config.max_noise_level)
        labels = noised_embedding(
            batch["img_emb"],
            draws.normal("denoiser.embedding_noise", (self.embed_dim,)),
            level,
            resident(self.mean, device),
            resident(self.std, device),
        )
        if not drop:
            return {"class_labels": labels, "text_hidden": batch["text_hidden"]}
        at = draws.uniform("denoiser.drop")
        return {
            "class_labels": chosen(at < self.config.image_drop, torch.zeros_like(labels), labels),
            "text_hidden": chosen(
                at < self.config.caption_drop, resident(self.empty_hidden, device), batch["text_hidden"]
            ),
        }


def fit(config: DenoiserConfig, columns: Columns) -> Denoiser:
    """The trainable with the dataset's sizes and statistics."""
    moments, (tokens, width) = columns.shape("vae_moments"), columns.shape("text_hidden")
    mean, std = widened_statistics(columns)
    hidden, _ = padded([torch.from_numpy(columns.empty("text_hidden"))], tokens)
    return Denoiser(
        config=config,
        latent_shape=(moments[0] // 2, moments[1], moments[2]),
        scaling_factor=float(columns.facts("vae_moments")["scaling_factor"]),
        embed_dim=len(mean),
        text_width=width,
        mean=mean,
        std=std,
        empty_hidden=hidden,
        vae=columns.maker("vae_moments"),
    )


def noised_embedding(embedding: Tensor, noise: Tensor, level: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The U-Net's class labels (B, 2D): `embedding` (B, D), unit length, noised to `level` (B,) int64, and the level's embedding.

    Standardised, noised with `noise` (B, D), put back, as `StableUnCLIPPipeline.noise_image_embeddings` does.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    standardised = (widened(embedding) - mean) / std
    augmented = noised(standardised, noise, *AUGMENTATION.coefficients(level)) * std + mean
    levels = get_timestep_embedding(level, embedding.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([augmented, levels], dim=1)


def network(model: nn.Module) -> Callable[..., Tensor]:
    """`model` as the maths calls it: (x_t (B, C, h, w), t, class_labels=(B, 2D), text_hidden=(B, T, W))."""

    def predict(x_t: Tensor, t: Tensor, *, class_labels: Tensor, text_hidden: Tensor) -> Tensor:
        return model(x_t, t, encoder_hidden_states=text_hidden, class_labels=class_labels, return_dict=False)[
            0
        ]

    return predict


@cache
def _vae(source: str | None, device: str) -> VaeEncoder | None:
    """The VAE of `source`; None, with a warning, where it cannot be loaded: pictures are no reason to end a training."""
    if source is None:
        return None
    try:
        return VaeEncoder.load(source, device)
    except (DarkroomError, OSError) as error:
        log.warning("pictures are shown as latents, without their VAE: %s", error)
        return None


def _attention_levels(config: DenoiserConfig) -> tuple[bool, ...]:
    if config.attention_levels is not None:
        return config.attention_levels
    levels = len(config.block_out_channels)
    return tuple(i < levels - 1 or levels == 1 for i in range(levels))
