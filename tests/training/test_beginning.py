"""What a training takes over from an earlier one of its kind."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data.errors import UserError
from training import loop
from training.beginning import begin_with
from training.systems.system import TrainConfig


class Net(nn.Module):
    """Two layers, a table whose length depends on the data, and a statistic of the data."""

    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        self.table = nn.Parameter(torch.zeros(rows, 2))
        self.mean = nn.Parameter(torch.zeros(8), requires_grad=False)


@pytest.fixture
def earlier(tmp_path):
    """A folder with the weights of a trained network, in two files; and these weights."""
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) for name, value in Net().state_dict().items()}
    first, second = list(weights)[:3], list(weights)[3:]
    for i, names in enumerate((first, second)):
        save_file({name: weights[name] for name in names}, tmp_path / f"weights-{i}.safetensors")
    return tmp_path, weights


def test_weights_are_taken_and_statistics_of_the_data_are_not(earlier):
    folder, weights = earlier
    model = Net()
    begin_with(model, folder)
    taken = model.state_dict()
    assert all(torch.equal(taken[name], weights[name]) for name in weights if name != "mean")
    assert not taken["mean"].any()


def test_a_part_of_another_shape_begins_anew_and_is_named(earlier, caplog):
    folder, weights = earlier
    model = Net(rows=4)
    with caplog.at_level(logging.WARNING, "darkroom.train"):
        logging.getLogger("darkroom").propagate = True
        begin_with(model, folder)
    assert not model.table.any() and torch.equal(model.body[0].weight, weights["body.0.weight"])
    assert "table begins anew" in caplog.text


def test_weights_of_another_network_are_refused(earlier):
    folder, _ = earlier
    other = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16))
    with pytest.raises(UserError, match="weights of another network: 0% of those that are trained here fit"):
        begin_with(other, folder)


def test_the_averaged_weights_begin_there_too(earlier):
    folder, weights = earlier

    class Trained:
        build = staticmethod(Net)

    state = loop.build_state(Trained(), TrainConfig(), lambda model: begin_with(model, folder))  # type: ignore[arg-type]
    with state.ema.swapped_in():
        assert torch.equal(state.model.body[1].weight.cpu(), weights["body.1.weight"])
