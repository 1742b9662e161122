"""Guidance: a denoiser in, a denoiser out."""

from __future__ import annotations

import pytest
import torch

from training.diffusion.guidance import classifier_free, guided, magnitude, rescaled, thresholded
from training.diffusion.objective import Objective
from training.diffusion.sampling import dpm_solver, sample
from training.randomness import Draws

DRAWS = Draws(0, torch.arange(5))
X_T, T, COND = DRAWS.normal("x", (3, 4)), 999 * DRAWS.uniform("t"), DRAWS.normal("c", (3, 1))
NOTHING = {"cond": torch.zeros(1, 3, 1)}


def shifted(x_t, t, *, cond):
    """A denoiser whose answer moves linearly with its condition."""
    return 0.5 * x_t + (1 - t / 1000).view(-1, 1, 1) * cond


def test_guidance_scale_one_is_the_denoiser_itself():
    assert guided(shifted, 1.0, NOTHING) is shifted


def test_guidance_scale_zero_ignores_the_condition():
    torch.testing.assert_close(guided(shifted, 0.0, NOTHING)(X_T, T, cond=COND), 0.5 * X_T)


def test_guidance_multiplies_what_the_condition_changes():
    torch.testing.assert_close(
        guided(shifted, 3.0, NOTHING)(X_T, T, cond=COND), shifted(X_T, T, cond=3 * COND)
    )


def test_both_predictions_are_made_in_one_call_of_twice_the_batch():
    sizes = []

    def counting(x_t, t, *, cond):
        sizes.append((len(x_t), len(t), len(cond)))
        return shifted(x_t, t, cond=cond)

    guided(counting, 2.0, NOTHING)(X_T, T, cond=COND)
    assert sizes == [(10, 10, 10)]


def test_guiding_x0_is_guiding_the_velocity():
    flow = Objective("flow")
    without, cond = DRAWS.normal("u", (3, 4)), DRAWS.normal("v", (3, 4))
    by_velocity = flow.x0_hat(classifier_free(without, cond, 2.5), X_T, T)
    by_x0 = classifier_free(flow.x0_hat(without, X_T, T), flow.x0_hat(cond, X_T, T), 2.5)
    torch.testing.assert_close(by_velocity, by_x0)


def test_full_rescale_restores_the_spread_of_the_conditional_prediction():
    strong = guided(shifted, 5.0, NOTHING, rescale=1.0)(X_T, T, cond=COND)
    plain = shifted(X_T, T, cond=COND)
    torch.testing.assert_close(strong.flatten(1).std(1), plain.flatten(1).std(1))
    assert torch.equal(rescaled(X_T, COND, 0.0), X_T)


def test_conditions_without_an_unconditional_are_refused():
    with pytest.raises(ValueError, match="other"):
        guided(shifted, 2.0, {"other": COND})(X_T, T, cond=COND)


def gaussian_denoiser(objective, variance):
    """E[x_0 | x_t] for x_0 ~ N(cond, variance) in every entry."""

    def denoise(x_t, t, *, cond):
        alpha, sigma = (c.view(-1, 1) for c in objective.coefficients(t))
        return cond + alpha * variance / (alpha**2 * variance + sigma**2) * (x_t - alpha * cond)

    return denoise


def test_guidance_is_the_score_of_a_power_of_the_conditional_over_the_unconditional():
    """p(x_t | c)^s p(x_t)^(1-s) (Ho & Salimans 2022, section 3.2), by automatic differentiation of both Gaussians."""
    objective, scale, t = Objective("flow"), 3.0, torch.tensor([400.0])
    alpha, sigma = objective.coefficients(t)
    x_t = torch.tensor([[0.3]], requires_grad=True)
    laws = [
        torch.distributions.Normal(alpha * mean, (alpha**2 * variance + sigma**2).sqrt())
        for mean, variance in ((0.0, 2.0), (1.0, 0.5))
    ]
    logs = [law.log_prob(x_t) for law in laws]
    score = torch.autograd.grad(((1 - scale) * logs[0] + scale * logs[1]).sum(), x_t)[0]
    means = [
        gaussian_denoiser(objective, variance)(x_t, t, cond=torch.tensor([[mean]]))
        for mean, variance in ((0.0, 2.0), (1.0, 0.5))
    ]
    x0 = classifier_free(means[0], means[1], scale)
    torch.testing.assert_close((alpha * x0 - x_t) / sigma**2, score)  # Tweedie's formula


@pytest.mark.parametrize("scale", [0.0, 2.0, 5.0])
def test_guided_samples_of_gaussians_of_one_variance_are_a_gaussian_at_the_extrapolated_mean(scale):
    """N(a, v) guided towards N(b, v) is N(a + s (b - a), v): with 50 steps, exact to 0.02."""
    objective, a, b, variance = Objective("flow"), -0.5, 1.0, 0.3
    x_t = Draws(0, torch.arange(4000)).normal("x", (1,))
    x_t = (x_t - x_t.mean()) / x_t.std()
    denoise = guided(gaussian_denoiser(objective, variance), scale, {"cond": torch.full((1, 1), a)})
    scheduler = dpm_solver(objective, prediction_type="sample")
    x = sample(denoise, scheduler, x_t, 50, cond=torch.full((4000, 1), b))
    assert x.mean().item() == pytest.approx(a + scale * (b - a), abs=0.02)
    assert x.var().item() == pytest.approx(variance, abs=0.02)


def test_outside_its_interval_guidance_is_off_and_costs_one_pass():
    sizes = []

    def counting(x_t, t, *, cond):
        sizes.append(len(x_t))
        return shifted(x_t, t, cond=cond)

    limited = guided(counting, 3.0, NOTHING, interval=(200.0, 600.0))
    t = torch.tensor([100.0, 200.0, 400.0, 599.0, 600.0])
    expected = torch.where(
        torch.tensor([False, True, True, True, False]).view(-1, 1, 1),
        shifted(X_T, t, cond=3 * COND),
        shifted(X_T, t, cond=COND),
    )
    torch.testing.assert_close(limited(X_T, t, cond=COND), expected)
    torch.testing.assert_close(limited(X_T, t * 0 + 700, cond=COND), shifted(X_T, t * 0 + 700, cond=COND))
    assert sizes == [10, 5]


def test_half_the_rescale_takes_back_half_the_excess_spread():
    x0, x0_cond = 4 * X_T, X_T
    torch.testing.assert_close(rescaled(x0, x0_cond, 0.5), 2.5 * X_T)


def test_thresholding_clips_at_the_percentile_and_scales_to_the_bound():
    ramp = torch.linspace(-2, 2, 4001).view(1, -1)  # |x| is uniform on [0, 2]: the percentile p is p / 50
    assert magnitude(ramp, 99.5).item() == pytest.approx(1.99, abs=1e-3)
    s = magnitude(ramp, 99.5)
    torch.testing.assert_close(thresholded(ramp, 99.5), ramp.clamp(-s, s) / s)
    torch.testing.assert_close(thresholded(ramp, 99.5, bound=1.5).abs().max().item(), 1.5)


def test_what_lies_within_the_bound_is_left_alone_but_for_its_outliers():
    ramp = torch.linspace(-2, 2, 4001).view(1, -1)
    assert torch.equal(thresholded(0.4 * ramp, 99.5), 0.4 * ramp)
    torch.testing.assert_close(thresholded(ramp, 25.0), ramp.clamp(-1, 1))


def test_guided_latents_keep_the_percentile_that_they_have_without_guidance():
    strong = guided(shifted, 8.0, NOTHING, threshold_percentile=90.0)(X_T, T, cond=COND)
    plain = shifted(X_T, T, cond=COND)
    free = guided(shifted, 8.0, NOTHING)(X_T, T, cond=COND)
    assert (magnitude(free, 90.0) > magnitude(plain, 90.0)).any()
    assert (strong.flatten(1).abs().amax(1) <= magnitude(plain, 90.0) + 1e-6).all()
