"""Guidance: a denoiser in, a denoiser out."""

from __future__ import annotations

import pytest
import torch

from training.diffusion.guidance import classifier_free, guided, rescaled
from training.diffusion.objective import Objective
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
