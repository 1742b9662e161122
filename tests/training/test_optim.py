"""The optimizer: which rate a step has, and which weights decay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from training.optim import build_optimizer, learning_rate, set_learning_rate
from training.systems import clip, denoiser, prior, vae
from training.systems.system import TrainConfig

CONFIG = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=0.2)


def test_the_rate_rises_in_equal_steps_and_reaches_its_peak_at_the_last_of_the_warm_up() -> None:
    assert [learning_rate(k, CONFIG) for k in range(10)] == pytest.approx([0.02 * (k + 1) for k in range(10)])


def test_after_the_warm_up_the_rate_is_half_a_cosine_down_to_zero() -> None:
    assert learning_rate(10, CONFIG) == pytest.approx(0.2)
    assert learning_rate(35, CONFIG) == pytest.approx(0.1 * (1 + 0.5**0.5))
    assert learning_rate(60, CONFIG) == pytest.approx(0.1)
    assert learning_rate(109, CONFIG) == pytest.approx(0.2 * 2.467e-4, rel=1e-3)
    assert learning_rate(110, CONFIG) == learning_rate(500, CONFIG) == 0


def test_a_constant_schedule_stays_at_the_peak() -> None:
    config = CONFIG.model_copy(update={"schedule": "constant"})
    assert learning_rate(4, config) == pytest.approx(0.1)
    assert {learning_rate(k, config) for k in (9, 10, 60, 109)} == {0.2}


@given(st.integers(1, 30), st.integers(0, 40), st.sampled_from(["cosine", "constant"]))
def test_every_step_has_a_positive_rate_up_to_the_peak(steps: int, warmup: int, schedule: str) -> None:
    config = TrainConfig(max_steps=steps, warmup_steps=warmup, schedule=schedule, learning_rate=0.2)
    rates = [learning_rate(k, config) for k in range(steps)]
    assert all(0 < rate <= 0.2 for rate in rates)
    if warmup:
        assert max(rates) == 0.2, "a warm-up longer than the run ends with it"


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Linear(4, 4), nn.Embedding(3, 2))
    model[2].weight.requires_grad_(False)
    groups = build_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    decayed, plain = ({id(p) for p in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert decayed == {id(model[0].weight)}
    norm, linear, table = model[1:]
    assert plain == {id(p) for p in (model[0].bias, norm.weight, norm.bias, linear.bias, table.weight)}


def test_of_the_real_networks_what_is_no_matrix_of_a_layer_does_not_decay(columns) -> None:
    clip_config = clip.ClipConfig(image_size=16, vision_layers=1, text_layers=1, context_length=12)
    small = denoiser.DenoiserConfig(block_out_channels=(8, 8), num_attention_heads=2, norm_num_groups=4)
    built = {
        "clip": clip.fit(clip_config, columns),
        "vae": vae.fit(vae.VaeConfig(block_out_channels=(8, 8), norm_num_groups=4), columns),
        "prior": prior.fit(prior.PriorConfig(num_layers=1), columns),
        "denoiser": denoiser.fit(small, columns),
    }
    plain_matrices = {}
    for name, trainable in built.items():
        model = trainable.build()
        decayed, plain = ({id(p) for p in g["params"]} for g in build_optimizer(model, small).param_groups)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert len(decayed) + len(plain) == len(parameters) and not decayed & plain
        assert all(
            n.endswith(("weight", "proj", "text_projection"))
            for n, p in parameters.items()
            if id(p) in decayed
        )
        plain_matrices[name] = {n for n, p in parameters.items() if id(p) in plain and p.ndim > 1}
    assert plain_matrices == {
        "clip": {"positional_embedding", "visual.positional_embedding", "token_embedding.weight"},
        "vae": set(),
        "prior": {"positional_embedding", "prd_embedding"},
        "denoiser": set(),
    }


def test_without_a_gradient_a_matrix_shrinks_by_rate_times_decay_and_a_vector_stays() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias.detach(), bias)


def test_a_model_of_matrices_alone_has_one_group() -> None:
    assert len(build_optimizer(nn.Linear(2, 2, bias=False), TrainConfig()).param_groups) == 1


def test_the_rate_is_set_in_every_group() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), TrainConfig())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
