"""A latent autoencoder: diffusers' `AutoencoderKL` with reconstruction and KL losses.

Legend: B batch, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from data.errors import UserError
from training.pixels import mirrored, to_uint8, to_unit_range
from training.randomness import Draws
from training.systems.embeddings import spread_indices
from training.systems.system import Batch, Columns, TrainConfig

STATISTICS_SAMPLES = 2048
"""Pictures over which the latents' mean and standard deviation are measured."""
_LOGVAR_RANGE = (-30.0, 20.0)


class VaeConfig(TrainConfig):
    """A small VAE; with `pretrained` nothing is trained and only that encoder is used."""

    pretrained: str | None = Field(
        None,
        description="a diffusers folder or a hub name of an AutoencoderKL, AutoencoderTiny, AutoencoderDC or VQModel; "
        "None: train one",
    )
    latent_channels: int = Field(4, ge=1, description="channels of the latent")
    block_out_channels: tuple[int, ...] = Field(
        (32, 64, 64),
        min_length=1,
        description="channels per resolution; each after the first halves the side",
    )
    layers_per_block: int = Field(1, ge=1, description="residual blocks per resolution")
    norm_num_groups: int = Field(
        8, ge=1, description="groups of the group norms; divides every channel count"
    )
    mid_block_attention: bool = Field(False, description="self-attention at the lowest resolution")
    l1_weight: float = Field(1.0, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    mse_weight: float = Field(1.0, ge=0, description="weight of the mean squared error of pixels in [-1, 1]")
    kl_weight: float = Field(
        1e-4, ge=0, description="weight of the mean KL divergence per latent value, in nats"
    )

    flip: bool = Field(
        False,
        description="mirror half of the training pictures, left and right; not where captions or letters tell the sides",
    )

    @field_validator("block_out_channels")
    @classmethod
    def _even(cls, channels: tuple[int, ...]) -> tuple[int, ...]:
        if any(c % 2 for c in channels):
            raise ValueError(f"block_out_channels {channels} has an odd count; give even ones")
        return channels


class PosteriorAutoencoder(nn.Module):
    """An `AutoencoderKL` whose sampling noise is an argument, so that one forward pass is all of a training step."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstruction (B, 3, H, W), mean, log-variance), the last two (B, C, h, w), of pixels in [-1, 1]."""
        posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * noise
        return self.vae.decode(latents, return_dict=False)[0], mean, logvar


@dataclass(frozen=True)
class Vae:
    """The autoencoding trainable."""

    config: VaeConfig
    image_size: int
    data: Columns
    columns: tuple[str, ...] = ("image",)

    def build(self) -> nn.Module:
        """A `PosteriorAutoencoder`."""
        from diffusers import AutoencoderKL

        levels = len(self.config.block_out_channels)
        return PosteriorAutoencoder(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=self.config.block_out_channels,
                latent_channels=self.config.latent_channels,
                layers_per_block=self.config.layers_per_block,
                norm_num_groups=self.config.norm_num_groups,
                mid_block_add_attention=self.config.mid_block_attention,
                sample_size=self.image_size,
                scaling_factor=1.0,
            )
        )

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.image_size // 2 ** (len(self.config.block_out_channels) - 1)
        return self.config.latent_channels, side, side

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """L1 + MSE of the pixels + KL to the standard normal, each a mean over its elements: (B,) float32."""
        pixels = to_unit_range(batch["image"])
        if self.config.flip:
            pixels = mirrored(pixels, draws.uniform("vae.flip") < 0.5)
        reconstruction, mean, logvar = model(pixels, draws.normal("vae.posterior", self.latent_shape()))
        error = (reconstruction.float() - pixels).flatten(1)
        pixel_loss = self.config.l1_weight * error.abs().mean(
            1
        ) + self.config.mse_weight * error.square().mean(1)
        return pixel_loss + self.config.kl_weight * kl_to_standard_normal(mean, logvar)

    def sample(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:  # noqa: ARG002
        """The batch's pictures, then what the posterior's mean decodes to: (2B, 3, H, W) uint8."""
        noise = torch.zeros(len(batch["image"]), *self.latent_shape(), device=batch["image"].device)
        return torch.cat([batch["image"], to_uint8(model(to_unit_range(batch["image"]), noise)[0].float())])

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Writes a diffusers VAE folder whose latents have mean 0 and standard deviation 1 per channel over the data."""
        vae = copy.deepcopy(model.vae).eval()
        standardise_latents(vae, *self._latent_statistics(vae))
        vae.register_to_config(scaling_factor=1.0)
        vae.save_pretrained(folder, safe_serialization=True)
        return {"scaling_factor": 1.0, "latent_shape": list(self.latent_shape())}

    @torch.inference_mode()
    def _latent_statistics(self, vae: Any, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) float64 of the latents of the data, the posterior's own variance included."""
        indices = spread_indices(len(self.data), STATISTICS_SAMPLES)
        moments = torch.zeros(
            3, self.config.latent_channels, dtype=torch.float64
        )  # count, sum, sum of squares
        for start in range(0, len(indices), batch_size):
            pixels = torch.from_numpy(self.data.rows("image", indices[start : start + batch_size]))
            posterior = vae.encode(to_unit_range(pixels.permute(0, 3, 1, 2).to(vae.device))).latent_dist
            mean, variance = posterior.mean.double().cpu(), posterior.var.double().cpu()
            terms = (torch.ones_like(mean), mean, mean.square() + variance)
            moments += torch.stack([term.sum((0, 2, 3)) for term in terms])
        count, first, second = moments
        return first / count, (second / count - (first / count).square()).clamp(min=1e-12).sqrt()


def fit(config: VaeConfig, columns: Columns) -> Vae:
    """The trainable for the dataset's picture size. Raises UserError when the VAE cannot halve it often enough."""
    height, width, _ = columns.shape("image")
    factor = 2 ** (len(config.block_out_channels) - 1)
    if height != width or height % factor:
        raise UserError(
            f"pictures are {height} x {width}; a VAE of {len(config.block_out_channels)} resolutions needs squares whose "
            f"side is a multiple of {factor}: set shard.image_size or vae.block_out_channels"
        )
    return Vae(config, height, columns)


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over latent values of KL(N(mean, exp logvar) || N(0, 1)), (B,) (Kingma & Welling 2013, 1312.6114, appendix B)."""
    logvar = logvar.clamp(*_LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


@torch.no_grad()
def standardise_latents(vae: Any, mean: Tensor, std: Tensor) -> None:
    """Changes the latents of `vae` to (z - mean) / std, both (C,), in place, and what it decodes them to not at all.

    The 1x1 convolutions on both sides of the latent take the change up, so any reader of the weights gets it. Channels of
    equal variance matter: at a given noise a diffusion model sees nothing of those much weaker than the rest.
    """
    channels, (encode, decode) = len(mean), (vae.quant_conv, vae.post_quant_conv)
    mean, std = (statistic.to(encode.weight) for statistic in (mean, std))
    encode.weight[:channels] /= std.view(-1, 1, 1, 1)
    encode.bias[:channels].sub_(mean).div_(std)
    encode.bias[channels:] -= 2 * std.log()
    decode.bias += (decode.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
    decode.weight *= std.view(1, -1, 1, 1)
