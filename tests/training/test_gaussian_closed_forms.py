"""Objectives and samplers on Gaussian data, whose exact denoiser is affine: every figure here has a closed form.

All draws are whitened, so that their mean is 0 and their covariance the identity exactly: a regression then finds the
population's minimiser, and what a sampler's moments are off by is its step size alone.
"""

from __future__ import annotations

import math

import pytest
import torch

from training.diffusion.objective import Objective, alphas_cumprod, denoiser, per_sample_mse
from training.diffusion.sampling import ddim, dpm_solver, sample
from training.randomness import Draws
from training.systems.denoiser import AUGMENTATION, noised_embedding

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MEAN = torch.tensor([0.5, -1.0])
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]])
OBJECTIVES = {
    "epsilon": Objective("epsilon", "scaled_linear"),
    "sample": Objective("sample", "squaredcos_cap_v2"),
    "v_prediction": Objective("v_prediction", "linear"),
    "zero_snr": Objective("v_prediction", "scaled_linear", zero_terminal_snr=True),
    "flow": Objective("flow"),
}


def whitened(count: int, width: int) -> torch.Tensor:
    """(count, width) of mean 0 and covariance 1, to rounding."""
    x = Draws(0, torch.arange(count)).normal("whitened", (width,)).double()
    x = x - x.mean(0)
    return (x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov(correction=0)).T)).float()


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 ~ N(MEAN, COVARIANCE) and standard normal noise, uncorrelated: (1000, 2) each."""
    z = whitened(1000, 4)
    return MEAN + z[:, :2] @ torch.linalg.cholesky(COVARIANCE).T, z[:, 2:]


def exact_x0(objective: Objective, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_t] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m)."""
    alpha, sigma = (c[0] for c in objective.coefficients(t[:1]))
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
    return MEAN + (x_t - alpha * MEAN) @ gain.T


def regressed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The affine function of `x` with the least squared error to `y`, at `x`."""
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return (design @ torch.linalg.lstsq(design, y.double()).solution).float()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("step", [20.0, 500.0, 900.0])
def test_the_minimiser_of_every_objective_is_the_exact_denoiser(name, step):
    """What the loss of any prediction type is least for, turned into x_0, is the posterior mean."""
    objective, (x0, noise) = OBJECTIVES[name], pairs()
    t = torch.full((len(x0),), step)
    x_t = objective.noised(x0, noise, t)
    best = regressed(x_t, objective.target(x0, noise, t))
    torch.testing.assert_close(objective.x0_hat(best, x_t, t), exact_x0(objective, x_t, t), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_min_snr_turns_the_least_loss_into_the_capped_snr_times_the_posteriors_variance(name):
    """min(SNR, gamma) x mean of tr Var(x_0 | x_t) / 2, whatever is predicted (Hang et al. 2023, eq. 9)."""
    objective, (x0, noise), gamma = OBJECTIVES[name], pairs(), 5.0
    for step in (100.0, 500.0, 900.0):
        t = torch.full((len(x0),), step)
        x_t = objective.noised(x0, noise, t)
        target = objective.target(x0, noise, t)
        loss = per_sample_mse(regressed(x_t, target), target) * objective.min_snr_weights(t, gamma)
        alpha, sigma = (c[0] for c in objective.coefficients(t[:1]))
        posterior = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + (alpha / sigma) ** 2 * torch.eye(2))
        expected = (alpha / sigma).square().clamp(max=gamma) * posterior.trace() / 2
        torch.testing.assert_close(loss.mean(), expected, atol=1e-5, rtol=2e-3)


def test_with_zero_terminal_snr_the_last_step_knows_the_mean_and_nothing_else():
    """alpha = 0 at t = 999: the minimiser is v = -m, so x_0 = m (Lin et al. 2023, arXiv 2305.08891, section 3.1)."""
    objective, (x0, noise) = OBJECTIVES["zero_snr"], pairs()
    t = torch.full((len(x0),), 999.0)
    x_t = objective.noised(x0, noise, t)
    torch.testing.assert_close(x_t, noise, atol=1e-5, rtol=0)
    best = regressed(x_t, objective.target(x0, noise, t))
    torch.testing.assert_close(best, -MEAN.expand_as(best), atol=1e-4, rtol=0)


def test_zero_terminal_snr_shifts_and_scales_the_square_roots_of_alphas_cumprod():
    """sqrt(abar') = (sqrt(abar) - sqrt(abar_T)) sqrt(abar_0) / (sqrt(abar_0) - sqrt(abar_T)) (Lin et al. 2023, algorithm 1)."""
    cpu = torch.device("cpu")
    plain, rescaled = (alphas_cumprod("scaled_linear", zero, cpu).sqrt() for zero in (False, True))
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(rescaled, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("level", [0, 250, 999])
def test_noise_augmentation_keeps_the_mean_share_and_the_variance_of_embeddings(level):
    """Of embeddings with the statistics' own mean m and deviations s: mean m, covariance abar C + (1 - abar) diag(s^2)."""
    x0, noise = pairs()
    std = COVARIANCE.diagonal().sqrt()
    levels = torch.full((len(x0),), level)
    labels = noised_embedding(x0 / math.sqrt(2), noise, levels, MEAN, std)[:, :2]
    share = AUGMENTATION.coefficients(levels[:1])[0].square()
    torch.testing.assert_close(labels.mean(0), MEAN, atol=1e-4, rtol=0)
    expected = share * COVARIANCE + (1 - share) * torch.diag(std**2)
    torch.testing.assert_close(labels.T.cov(correction=0), expected, atol=1e-4, rtol=0)


def exact_network(objective: Objective):
    """What a perfectly trained network returns: the objective's own target of E[x_0 | x_t] and of the noise that this implies."""

    def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (c[:, None] for c in objective.coefficients(t))
        x0 = exact_x0(objective, x_t, t)
        return objective.target(x0, (x_t - alpha * x0) / sigma, t)

    return network


def moments_off(objective: Objective, scheduler, steps: int) -> float:
    """The largest error of a mean or covariance entry of samples with the exact denoiser, by way of the network's output."""
    if objective.is_flow:  # whose network sees whole timesteps, and is exact at them only
        denoise = lambda x_t, t: exact_x0(objective, x_t, t)  # noqa: E731
    else:
        denoise = denoiser(exact_network(objective), objective)
    x = sample(denoise, scheduler, whitened(500, 2), steps)
    errors = [x.mean(0) - MEAN, x.T.cov(correction=0) - COVARIANCE]
    return max(float(error.abs().max()) for error in errors)


@pytest.mark.parametrize(
    ("name", "solver", "steps", "tolerance"),
    [
        ("sample", dpm_solver, 15, 0.02),
        ("sample", dpm_solver, 20, 0.01),
        ("sample", dpm_solver, 50, 0.005),
        ("sample", ddim, 50, 0.05),
        ("sample", ddim, 100, 0.03),
        (
            "epsilon",
            dpm_solver,
            50,
            0.04,
        ),  # the last timestep is no pure noise: what is left of the mean is lost
        ("epsilon", ddim, 50, 0.06),
        ("epsilon", ddim, 100, 0.04),
        ("v_prediction", ddim, 100, 0.04),
        ("zero_snr", dpm_solver, 20, 0.06),
        ("zero_snr", dpm_solver, 100, 0.01),
        ("zero_snr", ddim, 50, 0.06),
        ("zero_snr", ddim, 100, 0.035),
        ("flow", ddim, 100, 0.025),
        ("flow", dpm_solver, 20, 0.06),
    ],
)
def test_a_sampler_reproduces_mean_and_covariance(name, solver, steps, tolerance):
    options = {"prediction_type": "sample"} if solver is dpm_solver else {}
    assert moments_off(OBJECTIVES[name], solver(OBJECTIVES[name], **options), steps) < tolerance
