"""Checkpoints: what is restored is what was saved, to the bit, and damage is stepped over."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training import checkpoint, loop, optim, spikes
from training.checkpoint import TrainState
from training.ema import Ema
from training.randomness import Draws
from training.systems.system import Batch, TrainConfig

CHECKOUT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    max_steps=6, batch_size=4, warmup_steps=2, learning_rate=0.05, checkpoint_every=100, seed=5
)

TENSORS = "shard-00001-model-00001-of-00001.safetensors"
"""What a single process writes its tensors to."""

SAVER = """
import sys
from pathlib import Path
import torch
from torch import nn
from training import checkpoint, optim
from training.ema import Ema
from training.systems.system import TrainConfig
model = nn.Linear(600, 600)
state = checkpoint.TrainState(model, optim.build_optimizer(model, TrainConfig()), Ema(model, 0.9))
with checkpoint.Saver(Path(sys.argv[1]), "one") as saver:
    while True:
        state.clock += 1
        torch.nn.init.constant_(model.weight, state.clock)
        saver.save(state)
"""


class Regression:
    """A small `Trainable`: a noisy linear target."""

    columns = ("img_emb",)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        target = batch["img_emb"].sum(1, keepdim=True) + 0.1 * draws.normal("target", (1,))
        return (model(batch["img_emb"]) - target).square().flatten()

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        save_file(model.state_dict(), folder / "weights.safetensors")
        return {}


def _batches(first_step: int) -> Iterator[Batch]:
    while True:
        position = torch.arange(4) + 4 * first_step
        yield {"img_emb": torch.sin(position[:, None] * torch.arange(1, 4)).float(), "position": position}
        first_step += 1


def _run(folder: Path | str, until: int, config: TrainConfig = CONFIG, identity: str = "one") -> TrainState:
    """Trains like `loop.train` under `config`, but ends after step `until` with a checkpoint there."""
    trainable, state = Regression(), loop.build_state(Regression(), config)
    checkpoint.restore(folder, state, identity)
    for batch in _batches(state.clock):
        if state.clock == until:
            break
        loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model)
        state.clock += 1
    checkpoint.save(folder, state, identity)
    return state


def _everything(state: TrainState) -> dict[str, Any]:
    """All that a step changes, by name."""
    slots = {
        f"{i}.{name}": value
        for i, slot in state.optimizer.state_dict()["state"].items()
        for name, value in slot.items()
    }
    averages = {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    return {**state.model.state_dict(), **slots, **averages}


def _assert_equal_bits(one: TrainState, other: TrainState) -> None:
    left, right = _everything(one), _everything(other)
    assert left.keys() == right.keys() and len(left) > 15
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert (one.clock, one.curve, one.pending) == (other.clock, other.curve, other.pending)


def _flip(path: Path, at: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)


def test_three_steps_and_three_after_a_restore_are_six_steps_to_the_bit(tmp_path: Path) -> None:
    unbroken = _run(tmp_path / "unbroken", 6)
    _run(tmp_path / "broken", 3)
    _assert_equal_bits(_run(tmp_path / "broken", 6), unbroken)


def test_a_restored_state_is_the_saved_one(tmp_path: Path) -> None:
    saved = _run(tmp_path, 3)
    saved.curve, saved.pending = [{"step": 3, "loss": 1 / 3}], [[0.1, 2.0], [1 / 7, 3.0]]
    checkpoint.save(tmp_path, saved, "one")
    restored = loop.build_state(Regression(), CONFIG)
    assert checkpoint.restore(tmp_path, restored, "one")
    _assert_equal_bits(restored, saved)
    groups = [state.optimizer.param_groups for state in (restored, saved)]
    assert [[g["weight_decay"] for g in group] for group in groups] == [[0.01, 0.0]] * 2


def test_where_there_is_no_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    state = loop.build_state(Regression(), CONFIG)
    assert not checkpoint.restore(tmp_path / "absent", state, "one")
    assert state.clock == 0


def test_a_checkpoint_is_tensors_and_json_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        _run(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_00000002", "step_00000004"]
    assert (tmp_path / "LATEST").read_text() == "step_00000004"
    assert sorted(path.name for path in (tmp_path / "step_00000004").iterdir()) == [TENSORS, "state.json"]
    with safe_open(tmp_path / "step_00000004" / TENSORS, "pt") as tensors:
        kinds = {"model", "ema", "optimizer"}
        assert {name.split("/")[0] for name in tensors.keys()} == kinds  # noqa: SIM118  no mapping
    assert json.loads((tmp_path / "step_00000004" / "state.json").read_text())["clock"] == 4


@pytest.mark.parametrize(
    ("name", "at"),
    [(TENSORS, -1), (TENSORS, 200), ("state.json", None)],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, at: int | None
) -> None:
    _run(tmp_path, 2)
    older = _run(tmp_path, 2)
    _run(tmp_path, 4)
    path = tmp_path / "step_00000004" / name
    _flip(path, path.read_bytes().index(b'"clock": 4') + 9 if at is None else at)
    state = loop.build_state(Regression(), CONFIG)
    with caplog.at_level(logging.WARNING, "darkroom.checkpoint"):
        assert checkpoint.restore(tmp_path, state, "one")
    ours = [record.message for record in caplog.records if record.name == "darkroom.checkpoint"]
    assert len(ours) == 1 and ours[0].startswith(
        f"passing over damaged checkpoint {path.parent.name}: {name}"
    )
    _assert_equal_bits(state, older)


@pytest.mark.parametrize("state_json", [None, "", "[]", "{}", "3"])
def test_a_checkpoint_without_a_readable_state_is_passed_over(tmp_path: Path, state_json: str | None) -> None:
    _run(tmp_path, 2)
    _run(tmp_path, 4)
    path = tmp_path / "step_00000004" / "state.json"
    path.unlink() if state_json is None else path.write_text(state_json)
    state = loop.build_state(Regression(), CONFIG)
    assert checkpoint.restore(tmp_path, state, "one") and state.clock == 2


def test_the_one_with_the_lowest_validation_loss_stays_beside_the_newest(tmp_path: Path) -> None:
    state = loop.build_state(Regression(), CONFIG)
    for step, loss in ((1, None), (2, 0.5), (3, 0.3), (4, 0.4), (5, 0.3), (6, 0.9)):
        state.clock = step
        state.curve = [*(state.curve or []), {"step": step} | ({"validation_loss": loss} if loss else {})]
        checkpoint.save(tmp_path, state, "one", keep=1)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000003", "step_00000006"]


def test_what_is_written_is_the_state_of_the_save_and_not_of_the_steps_after_it(tmp_path: Path) -> None:
    model = nn.Linear(1000, 1000)
    state = TrainState(model, optim.build_optimizer(model, CONFIG), Ema(model, 0.9))
    with checkpoint.Saver(tmp_path, "one") as saver:
        for step in range(1, 4):
            state.clock = step
            nn.init.constant_(model.weight, step)
            saver.save(state)
            nn.init.constant_(model.weight, -1)
            state.pending.append((9.0, 9.0))
    assert checkpoint.restore(tmp_path, state, "one")
    assert state.clock == 3 and torch.equal(model.weight, torch.full((1000, 1000), 3.0))
    assert len(state.pending) == 2


def test_what_has_to_be_safe_first_is_asked_for_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    state = TrainState(model, optim.build_optimizer(model, CONFIG), Ema(model, 0.9))
    there: list[int] = []
    with checkpoint.Saver(
        tmp_path, "one", before=lambda: there.append(len(list(tmp_path.glob("step_*"))))
    ) as saver:
        for state.clock in (1, 2):
            saver.save(state)
    assert there == [0, 1]


def test_a_write_that_fails_is_raised_by_the_next_save_and_by_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    state = loop.build_state(Regression(), CONFIG)
    with pytest.raises(OSError, match="file"), checkpoint.Saver(tmp_path / "file" / "below", "one") as saver:
        saver.save(state)
    saver = checkpoint.Saver(tmp_path / "file" / "below", "one")
    saver.save(state)
    with pytest.raises(OSError, match="file"):
        saver.save(state)
    saver.wait()


def test_going_on_from_an_older_checkpoint_replaces_the_damaged_ones(tmp_path: Path) -> None:
    for step in (2, 4):
        _run(tmp_path, step)
    shutil.copytree(tmp_path / "step_00000004", tmp_path / "step_00000005")
    for step in (4, 5):
        _flip(tmp_path / f"step_0000000{step}" / TENSORS, -1)
    _run(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000002", "step_00000003"]
    _flip(tmp_path / "step_00000003" / TENSORS, -1)
    _run(tmp_path, 3)
    state = loop.build_state(Regression(), CONFIG)
    assert checkpoint.restore(tmp_path, state, "one") and state.clock == 3


def test_a_checkpoint_of_another_computation_is_refused(tmp_path: Path) -> None:
    _run(tmp_path, 2)
    state = loop.build_state(Regression(), CONFIG)
    with pytest.raises(ValueError, match="belongs to one, not to two: remove it or train elsewhere"):
        checkpoint.restore(tmp_path, state, "two")
    assert state.clock == 0


def test_whole_weights_are_a_copy() -> None:
    model = nn.Linear(2, 2)
    weights = checkpoint.whole_weights(model)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    nn.init.zeros_(model.weight)
    assert torch.equal(weights["weight"], before["weight"]) and not weights["weight"].requires_grad


@pytest.mark.slow
def test_a_run_killed_while_it_saves_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    newest = 0
    for wait in (0.0, 0.013, 0.031, 0.002):
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], cwd=CHECKOUT)
        deadline = time.monotonic() + 60
        while not (drafts := list(tmp_path.glob(".tmp-*"))) or not list(tmp_path.glob("step_*")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(wait)
        child.kill()
        child.wait()
        assert drafts
        model = nn.Linear(600, 600)
        state = TrainState(model, optim.build_optimizer(model, TrainConfig()), Ema(model, 0.9))
        assert checkpoint.restore(tmp_path, state, "one") and state.clock > 0
        assert torch.equal(model.weight, torch.full((600, 600), float(state.clock)))
        newest = state.clock
        checkpoint.save(tmp_path, state, "one")
        assert not list(tmp_path.glob(".tmp-*")), "what the killed one left is cleared away"
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
    assert newest
