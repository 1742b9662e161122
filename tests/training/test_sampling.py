"""Samplers with the exact denoiser of a Gaussian: the samples have its mean and covariance."""

from __future__ import annotations

import pytest
import torch

from training.diffusion.objective import Objective, denoiser
from training.diffusion.sampling import ddim, dpm_solver, sample
from training.randomness import Draws

MEAN = torch.tensor([0.5, -1.0])
COVARIANCE = torch.tensor([[0.8, 0.3], [0.3, 0.4]])
X_T = Draws(0, torch.arange(10_000)).normal("x_T", (2,))
pytestmark = pytest.mark.filterwarnings(  # numpy 2 warns about how diffusers turns a tensor into an array
    "ignore:__array__ implementation:DeprecationWarning"
)

PATHS = {
    "flow": Objective("flow"),
    "cosine": Objective("sample", "squaredcos_cap_v2"),
    "scaled_linear": Objective("v_prediction", "scaled_linear"),
    "zero_snr": Objective("v_prediction", "scaled_linear", zero_terminal_snr=True),
}


def exact_denoiser(objective: Objective):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE)."""

    def denoise(x_t, t):
        alpha, sigma = (c[0] for c in objective.coefficients(t[:1]))
        gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
        return MEAN + (x_t - alpha * MEAN) @ gain.T

    return denoise


def assert_gaussian(x: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(x.mean(0), MEAN, atol=tolerance, rtol=0)
    torch.testing.assert_close(x.T.cov(), COVARIANCE, atol=tolerance, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("steps", "tolerance"), [(20, 0.06), (100, 0.05)])
def test_dpm_solver_reproduces_the_data_distribution(path, steps, tolerance):
    objective = PATHS[path]
    x = sample(exact_denoiser(objective), dpm_solver(objective, prediction_type="sample"), X_T, steps)
    assert_gaussian(x, tolerance)


@pytest.mark.parametrize("path", ["flow", "cosine", "scaled_linear"])
def test_ddim_reproduces_the_data_distribution(path):
    x = sample(exact_denoiser(PATHS[path]), ddim(PATHS[path]), X_T, 100)
    assert_gaussian(x, 0.05)


def test_a_denoiser_that_knows_the_answer_gives_it():
    answer = X_T[:3].flip(0)
    for objective in PATHS.values():
        x = sample(lambda _x, _t: answer, dpm_solver(objective, prediction_type="sample"), X_T[:3], 7)
        torch.testing.assert_close(x, answer)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [5, 9, 20, 27])
def test_feeding_x0_takes_the_same_steps_as_a_pipeline_that_feeds_the_networks_output(path, steps):
    """9 and 27 steps put flow timesteps on the edge between two integers."""
    objective = PATHS[path]

    def network(x_t, timesteps):  # any smooth function of what a pipeline gives its U-Net
        return torch.tanh(x_t) + timesteps.view(-1, 1) / 1000

    ours = sample(
        denoiser(network, objective), dpm_solver(objective, prediction_type="sample"), X_T[:50], steps
    )
    scheduler = dpm_solver(objective)
    scheduler.set_timesteps(steps)
    theirs = X_T[:50] * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = network(theirs, timestep.float().expand(50))
        theirs = scheduler.step(output, timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_depends_on_its_own_noise_alone(path):
    objective = PATHS[path]
    run = lambda noise: sample(  # noqa: E731
        exact_denoiser(objective), dpm_solver(objective, prediction_type="sample"), noise, 6
    )
    torch.testing.assert_close(run(X_T[:8])[5:], run(X_T[5:8]))


def test_a_scheduler_that_expects_something_else_than_x0_is_refused():
    with pytest.raises(ValueError, match="flow_prediction"):
        sample(lambda x, _t: x, dpm_solver(Objective("flow")), X_T[:2], 2)


def test_on_the_flow_path_ddim_takes_eulers_steps():
    objective, steps = PATHS["flow"], 7
    denoise, scheduler = exact_denoiser(objective), ddim(objective)
    scheduler.set_timesteps(steps)
    x = X_T[:20]
    for now, then in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        velocity = (x - denoise(x, 1000 * now.expand(20))) / now
        x = x + (then - now) * velocity
    torch.testing.assert_close(sample(denoise, ddim(objective), X_T[:20], steps), x, atol=1e-5, rtol=1e-5)
