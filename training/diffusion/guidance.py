"""Guidance: a denoiser in, a denoiser out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.diffusion.objective import Denoise


def guided(
    denoise: Denoise,
    guidance_scale: float,
    unconditional: Mapping[str, Tensor],
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance around `denoise`, in one forward pass of twice the batch; at scale 1 `denoise` itself.

    `unconditional` holds, under the conditioning's own names, what stands for "no condition": (1, ...) or (B, ...).
    The combination is linear, so that on x_0 it equals the usual one on eps, v or the velocity at the same (x_t, t).
    """
    if guidance_scale == 1.0:
        return denoise

    def denoise_guided(x_t: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        if unconditional.keys() != conditioning.keys():
            raise ValueError(
                f"guidance knows no condition for {sorted(unconditional)} but is given {sorted(conditioning)}: name the same"
            )
        both = {name: torch.cat([unconditional[name].expand_as(c), c]) for name, c in conditioning.items()}
        without, x0_cond = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return rescaled(classifier_free(without, x0_cond, guidance_scale), x0_cond, rescale)

    return denoise_guided


def classifier_free(without: Tensor, x0_cond: Tensor, guidance_scale: float) -> Tensor:
    """without + s (cond - without) (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, with s = 1 + w)."""
    return without + guidance_scale * (x0_cond - without)


def rescaled(x0: Tensor, x0_cond: Tensor, rescale: float) -> Tensor:
    """`x0` with a share `rescale` of its excess spread over `x0_cond` taken back, per sample (Lin et al. 2023, 2305.08891, eq. 15-16)."""
    if rescale == 0.0:
        return x0
    ratio = x0_cond.flatten(1).std(1) / x0.flatten(1).std(1)
    return x0 * (rescale * ratio + 1 - rescale).view(-1, *[1] * (x0.ndim - 1))
