"""Objectives against closed forms: conversions invert each other, weights are what they claim."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from training.diffusion import objective as maths
from training.diffusion.objective import NOISE_SCHEDULES, PREDICTION_TYPES, Objective, denoiser
from training.randomness import Draws

DRAWS = Draws(0, torch.arange(64))
X0, NOISE = DRAWS.normal("x0", (3, 2)), DRAWS.normal("noise", (3, 2))
ALL = [Objective(p, s) for p, s in itertools.product(PREDICTION_TYPES, NOISE_SCHEDULES) if p != "flow"] + [
    Objective("flow")
]


def _inner_times(objective: Objective) -> torch.Tensor:
    """Timesteps at which the signal is not yet lost to rounding."""
    return objective.timesteps(DRAWS.uniform("t"), DRAWS.normal("t")).clamp(max=900)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_target_turned_back_into_x0_is_x0(objective):
    t = _inner_times(objective)
    x_t = objective.noised(X0, NOISE, t)
    torch.testing.assert_close(
        objective.x0_hat(objective.target(X0, NOISE, t), x_t, t), X0, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_the_signal_fades_from_all_to_almost_nothing(objective):
    alpha, sigma = objective.coefficients(torch.arange(1000.0))
    assert alpha[0] > 0.99 and sigma[0] < 0.05
    assert alpha[-1] < 0.07 and sigma[-1] > 0.99
    assert (alpha.diff() <= 0).all() and (sigma.diff() >= 0).all()


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
def test_a_variance_preserving_path_keeps_the_variance(schedule):
    alpha, sigma = Objective("epsilon", schedule).coefficients(torch.arange(1000.0))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))


def test_zero_terminal_snr_ends_in_pure_noise():
    alpha, _ = Objective("v_prediction", "scaled_linear", zero_terminal_snr=True).coefficients(
        torch.tensor([999.0])
    )
    assert alpha.item() == pytest.approx(0, abs=1e-6)


def test_v_is_the_angular_velocity_of_the_path():
    alpha, sigma = torch.cos(torch.tensor([0.4])), torch.sin(torch.tensor([0.4]))
    step = torch.tensor([1e-3])
    x0, noise = X0[:1], NOISE[:1]
    ahead, behind = (maths.noised(x0, noise, torch.cos(0.4 + s), torch.sin(0.4 + s)) for s in (step, -step))
    torch.testing.assert_close(
        maths.v_target(x0, noise, alpha, sigma), (ahead - behind) / (2 * step), atol=1e-3, rtol=0
    )


def test_the_flow_target_is_the_velocity_of_the_path():
    flow = Objective("flow")
    t, step = torch.full((64,), 400.0), 100.0
    velocity = (flow.noised(X0, NOISE, t + step) - flow.noised(X0, NOISE, t)) / (step / 1000)
    torch.testing.assert_close(flow.target(X0, NOISE, t), velocity, atol=1e-5, rtol=0)


def test_logit_normal_timesteps_have_the_median_and_spread_of_a_logit_normal():
    t = maths.logit_normal_timesteps(Draws(1, torch.arange(40_000)).normal("t")) / 1000
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
    assert (t < 1 / (1 + math.exp(1))).float().mean().item() == pytest.approx(0.1587, abs=0.01)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.2, 1.0), (-0.5, 0.4), (0.8, 1.7)])
def test_a_flows_timesteps_have_the_quantiles_of_its_logit_normal(mean: float, std: float) -> None:
    """The q-quantile is 1000 sigmoid(mean + std z_q) with z_q that of the standard normal: the median 1000 sigmoid(mean)."""
    objective = Objective("flow", logit_mean=mean, logit_std=std)
    draws = Draws(1, torch.arange(40_000))
    t = objective.timesteps(draws.uniform("t"), draws.normal("t")).double()
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = 1000 / (1 + math.exp(-mean - std * statistics.NormalDist().inv_cdf(q)))
        share = (t < expected).double().mean().item()
        assert share == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / len(t)))


def test_uniform_timesteps_are_whole_and_reach_both_ends():
    t = maths.uniform_timesteps(Draws(1, torch.arange(40_000)).uniform("t"))
    assert torch.equal(t, t.floor())
    assert (t.min(), t.max()) == (0, 999)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_min_snr_weights_turn_every_loss_into_the_same_loss_on_x0(objective):
    """weight x (error of the prediction)^2 = min(SNR, gamma) x (error of x_0)^2, whatever is predicted."""
    t = _inner_times(objective).clamp(min=20)
    alpha, sigma = objective.coefficients(t)
    x_t = objective.noised(X0, NOISE, t)
    output = objective.target(X0, NOISE, t) + 0.1 * NOISE.flip(0)
    error = maths.per_sample_mse(output, objective.target(X0, NOISE, t))
    x0_error = maths.per_sample_mse(objective.x0_hat(output, x_t, t), X0)
    capped = (alpha / sigma).square().clamp(max=5.0)
    torch.testing.assert_close(
        objective.min_snr_weights(t, 5.0) * error, capped * x0_error, rtol=2e-3, atol=1e-6
    )


def test_a_denoiser_gives_the_network_whole_timesteps_and_uses_the_exact_one_itself():
    seen = []

    def network(x_t, t):
        seen.append(t)
        return torch.ones_like(x_t)

    t = torch.full((64,), 499.75)
    x0_hat = denoiser(network, Objective("flow"))(X0, t)
    assert torch.equal(seen[0], torch.full((64,), 499.0))
    torch.testing.assert_close(x0_hat, X0 - 0.49975)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("x1",), "x1"),
        (("epsilon", "cubic"), "cubic"),
        (("epsilon", "linear", True), "zero_terminal_snr"),
    ],
)
def test_an_impossible_objective_is_refused_with_its_reason(arguments, word):
    with pytest.raises(ValueError, match=word):
        Objective(*arguments)
