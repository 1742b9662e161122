"""Deterministic sampling: the result is a function of x_T and the conditioning alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.diffusion.objective import NUM_TRAIN_TIMESTEPS, SCALED_LINEAR_BETAS, Denoise, Objective

_DIFFUSERS_NAME = {"flow": "flow_prediction"}
COSINE_LAMBDA_MIN = -5.1
"""Where the cosine schedule's last, nearly singular timesteps are cut off (Lu et al. 2022, arXiv 2211.01095)."""


def dpm_solver(objective: Objective, *, prediction_type: str | None = None, order: int = 2) -> Any:
    """diffusers' `DPMSolverMultistepScheduler` (DPM-Solver++, arXiv 2211.01095, 2M or of first order) for the path of
    `objective`.

    As it is, it takes the outputs of the objective's own network, which is what a pipeline's folder needs; with
    `prediction_type="sample"` it takes a denoiser's x_0, which is what `sample` feeds it. Both take the same steps.
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    own = _DIFFUSERS_NAME.get(objective.prediction_type, objective.prediction_type)
    kwargs: dict[str, Any] = {
        "prediction_type": prediction_type or own,
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "solver_order": order,
    }
    if objective.is_flow:
        return DPMSolverMultistepScheduler(use_flow_sigmas=True, **kwargs)
    return DPMSolverMultistepScheduler(**kwargs, **_schedule(objective), **_cut(objective))


def ddim(objective: Objective) -> Any:
    """diffusers' `DDIMScheduler` (Song et al. 2020, arXiv 2010.02502, eq. 12 with eta 0), fed x_0.

    On the flow path its step is Euler's, which is what DPM-Solver++ of first order takes there.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if objective.is_flow:
        return dpm_solver(objective, prediction_type="sample", order=1)
    return DDIMScheduler(
        prediction_type="sample",
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        **_schedule(objective),
    )


SAMPLERS: dict[str, Callable[[Objective], Any]] = {
    "dpm_solver": partial(dpm_solver, prediction_type="sample"),
    "ddim": ddim,
}
"""Name -> the scheduler that `sample` takes, for the path of an objective."""


@torch.no_grad()
def sample(
    denoise: Denoise,
    scheduler: Any,
    x_T: Tensor,  # noqa: N803
    num_inference_steps: int,
    **conditioning: Any,
) -> Tensor:
    """x_0 (B, ...) float32 by `scheduler`, built for `prediction_type="sample"`, from the standard normal `x_T` (B, ...)."""
    if scheduler.config.prediction_type != "sample":
        raise ValueError(
            f"the scheduler expects {scheduler.config.prediction_type!r} but a denoiser gives x_0: "
            "build it with prediction_type='sample'"
        )
    scheduler.set_timesteps(num_inference_steps, device=x_T.device)
    x_t = x_T * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        t = _exact_time(scheduler, i).to(x_t.device).expand(len(x_t))
        x_t = scheduler.step(denoise(x_t, t, **conditioning), timestep, x_t, return_dict=False)[0]
    return x_t


def _exact_time(scheduler: Any, i: int) -> Tensor:
    """The i-th step's t. A flow scheduler cuts t = 1000 sigma to an integer; the fraction is restored from its sigmas."""
    whole = scheduler.timesteps[i].float().cpu()
    if not scheduler.config.get("use_flow_sigmas", False):
        return whole
    return (scheduler.sigmas[i] * NUM_TRAIN_TIMESTEPS).clamp(whole, torch.nextafter(whole + 1, whole))


def _schedule(objective: Objective) -> dict[str, Any]:
    betas = SCALED_LINEAR_BETAS if objective.noise_schedule == "scaled_linear" else {}
    return {
        "beta_schedule": objective.noise_schedule,
        "rescale_betas_zero_snr": objective.zero_terminal_snr,
        **betas,
    }


def _cut(objective: Objective) -> dict[str, Any]:
    return (
        {"lambda_min_clipped": COSINE_LAMBDA_MIN} if objective.noise_schedule == "squaredcos_cap_v2" else {}
    )
