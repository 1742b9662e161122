"""A frozen latent autoencoder of diffusers, whichever of its four kinds.

Legend: B batch, H W pixels, C latent channels, h w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError
from training import hub
from training.pixels import to_uint8, to_unit_range
from training.pretrained import (
    CONFIG,
    DAMAGED,
    DTYPES,
    Precision,
    frozen,
    in_one_line,
    require_safetensors,
    require_uint8,
    require_whole,
    vae_folder,
)

KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
"""Classes of diffusers; the first gives a posterior, the others one latent."""
LOGVAR_RANGE = (-30.0, 20.0)
"""Where diffusers' `DiagonalGaussianDistribution` clamps the log-variance."""


@dataclass(frozen=True)
class VaeEncoder:
    """A frozen diffusers `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC` or `VQModel`."""

    vae: Any

    @classmethod
    def load(
        cls, source: str, device: str | torch.device = "cpu", precision: Precision = "fp32"
    ) -> VaeEncoder:
        """The VAE of `source`: a diffusers folder (also a pipeline's, with a `vae` sub-folder) or a hub name.

        Raises UserError when the folder is incomplete, the class is another, the hub's weights cannot be downloaded, or
        its config says that fp16 is too narrow for it.
        """
        folder = vae_folder(source) or vae_folder(str(hub.folder(source, "vae")))
        assert folder is not None, "what was downloaded is a folder"
        require_safetensors(folder, "diffusers VAE")
        vae = _loaded(folder, DTYPES[precision])
        if precision == "fp16" and getattr(vae.config, "force_upcast", False):
            raise UserError(
                f"precision=fp16: the config of {source} says that its activations leave the range of fp16 "
                "(force_upcast): use bf16 or fp32"
            )
        return cls(frozen(vae, device))

    @property
    def scaling_factor(self) -> float:
        """What unscaled latents are multiplied by so that their standard deviation is about 1."""
        return float(self.vae.config.scaling_factor)

    @property
    def reduction(self) -> int:
        """How many pixels of a side become one latent: the sides of pictures are multiples of it."""
        config = self.vae.config
        channels = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        return 2 ** (len(channels) - 1)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) float32, mean then log-variance, unscaled, of (B, 3, H, W) uint8 pixels.

        The log-variance lies in [-30, 20], as diffusers samples it. A kind without a posterior gives its latent as the
        mean and -30 everywhere as the log-variance: a standard deviation of 3e-7, a thousandth of what float16 resolves
        of a latent of order 1, so that whoever samples the posterior gets the latent. Of a `VQModel` it is the latent
        before quantisation, which its decoder does itself. Raises UserError for sides that are no multiple of `reduction`.
        """
        require_uint8(pixels)
        self._require_sides(pixels)
        x = to_unit_range(pixels.to(self.vae.device, non_blocking=True)).to(self.vae.dtype)
        latent = self.vae.encode(x, return_dict=False)[0]
        if isinstance(latent, Tensor):
            mean = latent.float()
            return torch.cat([mean, torch.full_like(mean, LOGVAR_RANGE[0])], dim=1)
        return torch.cat([latent.mean.float(), latent.logvar.float()], dim=1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 of unscaled `latents` (B, C, h, w) float32."""
        return to_uint8(self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0])

    def _require_sides(self, pixels: Tensor) -> None:
        height, width = pixels.shape[-2:]
        if height % self.reduction or width % self.reduction:
            raise UserError(
                f"pictures are {width} x {height} and this VAE reduces sides {self.reduction}-fold: set shard.image_size "
                f"to a multiple of {self.reduction} with shard.resize center_crop or border"
            )


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers

    here = {"local_files_only": True}
    try:
        name = diffusers.AutoencoderKL.load_config(folder, **here).get("_class_name", KINDS[0])
        if name not in KINDS:
            raise UserError(f"{folder} holds a {name}: give a {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        vae, loading = getattr(diffusers, name).from_pretrained(
            folder,
            **here,
            torch_dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs `accelerate`
            output_loading_info=True,
        )
        require_whole(folder, loading)
        return vae
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"no VAE can be loaded from {folder} ({in_one_line(error)}): copy {CONFIG} and "
            "diffusion_pytorch_model.safetensors of its repository there again"
        ) from error
