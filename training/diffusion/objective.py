"""The noising path x_t = alpha_t x_0 + sigma_t eps, what a network may predict on it, and the weights of its loss.

Legend: B batch, t (B,) float32 timesteps in [0, 1000), x_0 x_t eps (B, ...), alpha sigma (B,).
A variance-preserving path reads alpha and sigma from `alphas_cumprod`; on the flow path alpha = 1 - t/1000, sigma = t/1000.
Every random number comes in as an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow")
NOISE_SCHEDULES = ("squaredcos_cap_v2", "scaled_linear", "linear")
SCALED_LINEAR_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's; the other schedules have their papers' betas, which are diffusers' defaults."""

Denoise = Callable[..., Tensor]
"""x0_hat = denoise(x_t, t, **conditioning): (B, ...), (B,) in [0, 1000) -> (B, ...)."""


@dataclass(frozen=True)
class Objective:
    """A noising path and the quantity that the network predicts on it."""

    prediction_type: str
    noise_schedule: str = "squaredcos_cap_v2"
    """Of the variance-preserving path; the flow path has none."""
    zero_terminal_snr: bool = False
    logit_mean: float = 0.0
    """Of the flow path's logit-normal timesteps in training; above 0 for more noise. `logit_std` likewise."""
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}"
            )
        if self.noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(
                f"noise_schedule is {self.noise_schedule!r}; choose one of {', '.join(NOISE_SCHEDULES)}"
            )
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr leaves no signal at the last timestep: predict 'v_prediction' or 'sample'"
            )

    @property
    def is_flow(self) -> bool:
        """Whether the path is the straight line of rectified flow."""
        return self.prediction_type == "flow"

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), (B,) float32 each. A variance-preserving path takes whole timesteps."""
        if self.is_flow:
            sigma = t / NUM_TRAIN_TIMESTEPS
            return 1 - sigma, sigma
        bar = alphas_cumprod(self.noise_schedule, self.zero_terminal_snr, t.device)[t.long()]
        return bar.sqrt(), (1 - bar).sqrt()

    def timesteps(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """t (B,) for training: logit-normal on the flow path (from `normal`), else whole and uniform (from `uniform`)."""
        if self.is_flow:
            return logit_normal_timesteps(normal, self.logit_mean, self.logit_std)
        return uniform_timesteps(uniform)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, ...) at timesteps t."""
        return noised(x0, noise, *self.coefficients(t))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return for x_t: (B, ...)."""
        return _TARGET[self.prediction_type](x0, noise, *self.coefficients(t))

    def x0_hat(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a network's `output` (B, ...) at (x_t, t) implies."""
        return _X0_HAT[self.prediction_type](output, x_t, *self.coefficients(t))

    def min_snr_weights(self, t: Tensor, gamma: float) -> Tensor:
        """Loss weights (B,) of this prediction type; see `min_snr_weights`."""
        return min_snr_weights(*self.coefficients(t), self.prediction_type, gamma)


def denoiser(network: Callable[..., Tensor], objective: Objective) -> Denoise:
    """The denoiser of `network(x_t, timesteps, **conditioning) -> output`.

    The network sees whole timesteps, as `diffusers` pipelines call it; the conversion to x_0 uses the exact t.
    """

    def denoise(x_t: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        return objective.x0_hat(network(x_t, t.floor(), **conditioning), x_t, t)

    return denoise


@functools.cache
def alphas_cumprod(noise_schedule: str, zero_terminal_snr: bool, device: torch.device) -> Tensor:
    """(1000,) float32: the signal's share of the variance at every whole timestep, falling towards 0.

    Kept per device, since a step that copies it there would wait for the copy.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    betas: dict[str, Any] = SCALED_LINEAR_BETAS if noise_schedule == "scaled_linear" else {}
    return DDPMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_schedule=cast(Any, noise_schedule),
        rescale_betas_zero_snr=zero_terminal_snr,
        **betas,
    ).alphas_cumprod.to(device)


def noised(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps (Ho et al. 2020, arXiv 2006.11239, eq. 4; Liu et al. 2022, arXiv 2209.03003, eq. 1)."""
    return _like(alpha, x0) * x0 + _like(sigma, x0) * noise


def epsilon_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    """eps (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""
    return noise


def sample_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    """x_0 (Ramesh et al. 2022, arXiv 2204.06125, eq. 2)."""
    return x0


def v_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha eps - sigma x_0 (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    return _like(alpha, x0) * noise - _like(sigma, x0) * x0


def flow_target(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    """eps - x_0, the straight path's velocity in t (Esser et al. 2024, arXiv 2403.03206, eq. 13)."""
    return noise - x0


def x0_from_epsilon(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(x_t - sigma eps_hat) / alpha (Ho et al. 2020, arXiv 2006.11239, eq. 15)."""
    return (x_t - _like(sigma, x_t) * output) / _like(alpha, x_t)


def x0_from_sample(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    """The output itself."""
    return output


def x0_from_v(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """alpha x_t - sigma v_hat (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""
    return _like(alpha, x_t) * x_t - _like(sigma, x_t) * output


def x0_from_flow(output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG001
    """x_t - sigma v_hat (Liu et al. 2022, arXiv 2209.03003, section 2)."""
    return x_t - _like(sigma, x_t) * output


_TARGET = {
    "epsilon": epsilon_target,
    "sample": sample_target,
    "v_prediction": v_target,
    "flow": flow_target,
}
_X0_HAT = {
    "epsilon": x0_from_epsilon,
    "sample": x0_from_sample,
    "v_prediction": x0_from_v,
    "flow": x0_from_flow,
}


def uniform_timesteps(uniform: Tensor) -> Tensor:
    """Whole timesteps 0 to 999 as float32 from `uniform` (B,) in [0, 1)."""
    return (uniform * NUM_TRAIN_TIMESTEPS).floor().clamp(max=NUM_TRAIN_TIMESTEPS - 1)


def logit_normal_timesteps(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """1000 sigmoid(mean + std n) for standard normal n (B,) (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    return NUM_TRAIN_TIMESTEPS * torch.sigmoid(mean + std * normal)


def min_snr_weights(alpha: Tensor, sigma: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Weights (B,) that make the loss one on x_0 weighted by min(SNR, gamma) (Hang et al. 2023, arXiv 2303.09556, eq. 9).

    SNR = alpha^2 / sigma^2. The squared error of eps is SNR times that of x_0, of v (SNR + 1) times, of the flow's
    velocity 1 / sigma^2 times; each is divided out.
    """
    snr = (alpha / sigma.clamp(min=1e-6)).square()
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return capped / snr.clamp(min=1e-12)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped * sigma.square() if prediction_type == "flow" else capped


def per_sample_mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first axis: (B,) float32."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    return coefficient.view(-1, *[1] * (x.ndim - 1))
