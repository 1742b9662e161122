"""Guidance: a denoiser in, a denoiser out.

Legend: B batch, t (B,) timesteps in [0, 1000), x_0 (B, ...).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from training.diffusion.objective import NUM_TRAIN_TIMESTEPS, Denoise

EVERYWHERE = (0.0, float(NUM_TRAIN_TIMESTEPS))


def guided(
    denoise: Denoise,
    guidance_scale: float,
    unconditional: Mapping[str, Tensor],
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
    threshold_percentile: float | None = None,
) -> Denoise:
    """Classifier-free guidance around `denoise`, in one forward pass of twice the batch; at scale 1 `denoise` itself.

    `unconditional` holds, under the conditioning's own names, what stands for "no condition": (1, ...) or (B, ...).
    The combination is linear, so that on x_0 it equals the usual one on eps, v or the velocity at the same (x_t, t).
    Outside `interval`, low <= t < high, the conditional prediction stands, at the cost of one pass (Kynkäänniemi et al.
    2024, arXiv 2404.07724, eq. 5, whose noise levels are timesteps here). `rescale` as in `rescaled`. With
    `threshold_percentile` see `thresholded`: the bound is that percentile of the conditional prediction itself, since
    latents, unlike pixels, have none of their own.
    """
    if guidance_scale == 1.0:
        return denoise

    def combine(without: Tensor, x0_cond: Tensor) -> Tensor:
        x0 = rescaled(classifier_free(without, x0_cond, guidance_scale), x0_cond, rescale)
        if threshold_percentile is None:
            return x0
        return thresholded(x0, threshold_percentile, magnitude(x0_cond, threshold_percentile))

    def denoise_guided(x_t: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        if unconditional.keys() != conditioning.keys():
            raise ValueError(
                f"guidance knows no condition for {sorted(unconditional)} but is given {sorted(conditioning)}: name the same"
            )
        inside = (t >= interval[0]) & (t < interval[1])
        if interval != EVERYWHERE and not inside.any():
            return denoise(x_t, t, **conditioning)
        both = {name: torch.cat([unconditional[name].expand_as(c), c]) for name, c in conditioning.items()}
        without, x0_cond = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return torch.where(_like(inside, x_t), combine(without, x0_cond), x0_cond)

    return denoise_guided


def classifier_free(without: Tensor, x0_cond: Tensor, guidance_scale: float) -> Tensor:
    """without + s (cond - without) (Ho & Salimans 2022, arXiv 2207.12598, eq. 6, with s = 1 + w)."""
    return without + guidance_scale * (x0_cond - without)


def rescaled(x0: Tensor, x0_cond: Tensor, rescale: float) -> Tensor:
    """`x0` with a share `rescale` of its excess spread over `x0_cond` taken back, per sample (Lin et al. 2023, 2305.08891, eq. 15-16)."""
    if rescale == 0.0:
        return x0
    ratio = x0_cond.flatten(1).std(1) / x0.flatten(1).std(1)
    return x0 * _like(rescale * ratio + 1 - rescale, x0)


def magnitude(x0: Tensor, percentile: float) -> Tensor:
    """(B,): the percentile, 0 to 100, of each sample's absolute values."""
    return torch.quantile(x0.flatten(1).abs().float(), percentile / 100, dim=1)


def thresholded(x0: Tensor, percentile: float, bound: Tensor | float = 1.0) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): clipped to ±s and scaled to ±bound.

    s is the percentile of a sample's absolute values, or `bound` (B,) where that is larger: such a sample is clipped to
    ±bound and otherwise left alone. Pixels in [-1, 1] have bound 1. Of a latent, which has no bound, it says: at most a
    share of 1 - percentile/100 of its entries may be larger than the bound.
    """
    bound = _like(torch.as_tensor(bound, device=x0.device).expand(len(x0)), x0)
    s = torch.maximum(_like(magnitude(x0, percentile), x0), bound)
    return x0.clamp(-s, s) * (bound / s)


def _like(per_sample: Tensor, x: Tensor) -> Tensor:
    return per_sample.view(-1, *[1] * (x.ndim - 1))
