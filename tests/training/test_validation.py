"""The held-out loss: a fixed question to the averaged weights, which leaves the training as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.loader import held_out_batches
from tests.training.conftest import MemoryColumns
from training import distributed, loop, validation, window
from training.randomness import Draws
from training.systems import clip, denoiser, prior, vae
from training.systems.system import Batch, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
import worlds

SIZES = {"block_out_channels": (8, 8), "norm_num_groups": 4}
CONFIG = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "ema_decay": 0.9, "validate_every": 2}


def _denoiser(columns):
    config = denoiser.DenoiserConfig(num_attention_heads=2, prediction_type="v_prediction", **SIZES, **CONFIG)
    return denoiser.fit(config, columns), config


def _batches(trainable, columns) -> loop.Batches:
    def from_step(first: int) -> Iterator[Batch]:
        for step in range(first, 10**9):
            position = step * 4 + torch.arange(4)
            yield columns.batch(trainable.columns, [p % 4 for p in position.tolist()]) | {
                "position": position
            }

    return from_step


def _held_out(trainable, columns, size: int = 8) -> validation.HeldOut:
    return lambda: [
        columns.batch(trainable.columns, range(4, 12)[i : i + size]) | {"position": torch.arange(i, i + size)}
        for i in range(0, 8, size)
    ]


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)


def test_validation_leaves_training_as_it_is_and_lies_in_the_curve(columns, tmp_path: Path) -> None:
    trainable, config = _denoiser(columns)
    states, rows = [], []
    for name, held_out in (("with", _held_out(trainable, columns)), ("without", None)):
        states.append(
            loop.train(
                trainable,
                _batches(trainable, columns),
                config,
                tmp_path / name,
                identity="one",
                held_out=held_out,
                report=rows.append,
            )
        )
    for one, other in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.equal(one, other)
    losses = [row["validation_loss"] for row in states[0].curve or []]
    assert [loss is not None for loss in losses] == [False, True, False, True, False, True]
    assert [row["validation_loss"] for row in rows[:6]] == losses, "the row that is reported has it too"
    assert [row["validation_loss"] for row in states[1].curve or []] == [None] * 6
    again = validation.validation_loss(trainable, states[1], config, _held_out(trainable, columns, size=2))
    assert again == pytest.approx(losses[-1], rel=1e-6), "a question whose answer no batch size changes"


def test_every_sample_is_asked_at_one_of_eight_equidistant_timesteps_of_the_averaged_weights(columns) -> None:
    trainable, config = _denoiser(columns)
    state = loop.build_state(trainable, config)
    with torch.no_grad():
        for average in state.ema.shadow:
            average.zero_()
    asked: list[Tensor] = []
    true_loss = denoiser.Denoiser.loss

    class Watched(denoiser.Denoiser):
        def loss(self, model, batch, draws, t=None):
            asked.append(t)
            assert not model.training and all((p == 0).all() for p in model.parameters())
            return true_loss(self, model, batch, draws, t)

    watched = Watched(**{name: getattr(trainable, name) for name in trainable.__dataclass_fields__})
    loss = validation.validation_loss(watched, state, config, _held_out(trainable, columns))
    assert torch.cat(asked).tolist() == [0, 125, 250, 375, 500, 625, 750, 875]
    batch = next(iter(_held_out(trainable, columns)()))
    draws = Draws(validation.SEED, batch["position"])
    x0, noise = trainable._latents(batch["vae_moments"], draws), draws.normal("denoiser.noise", (2, 4, 4))
    target = config.objective().target(x0, noise, torch.cat(asked))
    assert loss == pytest.approx(float(target.square().mean()), rel=1e-5), "a network of zeros predicts zeros"
    assert state.model.training and any((p != 0).any() for p in state.model.parameters())


@pytest.mark.parametrize("name", ["clip", "vae", "prior"])
def test_every_trainable_has_a_held_out_loss(columns, name: str) -> None:
    config, fit = {
        "clip": (clip.ClipConfig(image_size=16, vision_layers=1, text_layers=1, context_length=12), clip.fit),
        "vae": (vae.VaeConfig(**SIZES), vae.fit),
        "prior": (prior.PriorConfig(num_layers=1), prior.fit),
    }[name]
    trainable = fit(config, columns)
    state = loop.build_state(trainable, config)
    held_out = _held_out(trainable, columns)
    loss = validation.validation_loss(trainable, state, config, held_out)
    assert loss > 0 and loss == validation.validation_loss(trainable, state, config, held_out)
    if name == "vae":
        batch = next(iter(held_out()))
        losses = trainable.loss(state.model, batch, Draws(validation.SEED, batch["position"]))
        assert loss == pytest.approx(float(losses.detach().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("previous", "clock", "due"),
    [(0, 40, False), (80, 100, True), (40, 120, True), (100, 120, False), (900, 930, True)],
)
def test_it_is_due_once_per_interval_and_at_the_end(previous: int, clock: int, due: bool) -> None:
    assert validation.is_due(previous, clock, TrainConfig(max_steps=930, validate_every=100)) is due
    assert not validation.is_due(previous, clock, TrainConfig(max_steps=930))


def _trainable(name: str, columns: MemoryColumns) -> Any:
    if name == "denoiser":
        return _denoiser(columns)[0]
    tower = {"image_size": 16, "vision_layers": 1, "text_layers": 1, "context_length": 12}
    return clip.fit(clip.ClipConfig(**tower), columns)


def _loss_of_eleven(name: str) -> float:
    """The held-out loss of fresh weights over eleven samples, in global batches of six."""
    columns = MemoryColumns(11)
    trainable = _trainable(name, columns)
    state = loop.build_state(trainable, trainable.config)

    def held_out() -> Iterator[Batch]:
        return held_out_batches(
            columns,  # type: ignore[arg-type]
            trainable.columns,
            batch_size=6,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    return validation.validation_loss(trainable, state, trainable.config, held_out)


def _losses_of_eleven() -> list[float]:
    return [_loss_of_eleven(name) for name in ("denoiser", "clip")]


def ask(found: str) -> None:
    """Leaves what every rank of a world finds."""
    losses = distributed.gathered(_losses_of_eleven())
    Path(found).write_text(json.dumps(losses))


@pytest.mark.slow
def test_any_number_of_workers_finds_the_loss_of_every_sample(tmp_path: Path) -> None:
    alone = _losses_of_eleven()
    for size in (2, 3):
        worlds.run(__file__, "ask", size, str(tmp_path / "found.json"))
        for found in json.loads((tmp_path / "found.json").read_text()):
            assert found == pytest.approx(alone, rel=1e-6)
