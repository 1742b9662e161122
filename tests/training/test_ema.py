"""The moving average of weights, against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.ema import Ema


def _model(value: float) -> nn.Linear:
    model = nn.Linear(2, 3)
    _fill(model, value)
    return model


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_constant_weights_are_approached_by_the_power_of_the_decay() -> None:
    model = _model(0.0)
    ema = Ema(model, 0.9)
    _fill(model, 1.0)
    late = 10_000  # the warm-up is over
    for n in range(1, 20):
        ema.update(late)
        expected = torch.full((3, 2), 1 - 0.9**n)
        torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_the_decay_warms_up() -> None:
    model, ema = (m := _model(0.0)), Ema(m, 0.9)
    average = 0.0
    for step in range(100):
        _fill(model, float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * step
        assert ema.state_dict()["bias"].tolist() == pytest.approx([average] * 3, rel=1e-5)


def test_a_decay_of_zero_follows_the_weights_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    ema = Ema(model, 0.0)
    nn.init.normal_(model.weight)
    ema.update(0)
    assert torch.equal(ema.state_dict()["weight"], model.weight)


def test_swapping_in_shows_the_average_and_restores_every_bit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    ema = Ema(model, 0.999)
    nn.init.normal_(model.weight)
    ema.update(500)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: average.clone() for name, average in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.swapped_in():
        assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
        raise KeyError
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, averages[name]) for name, p in ema.state_dict().items())


def test_what_is_not_trained_is_not_averaged() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    assert sorted(Ema(model, 0.9).state_dict()) == ["0.bias", "0.weight", "1.weight"]
