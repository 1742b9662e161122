"""The loop: exact steps, an honest curve, and a result that depends neither on interruptions nor on the world size.

Run as a program, this file is one training worker: `test_loop.py FOLDER SETTINGS_JSON LAST_STEP`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import checkpoint, distributed, flops, loop, optim, spikes, window
from training.checkpoint import TrainState
from training.randomness import Draws
from training.systems.system import Batch, TrainConfig

CHECKOUT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    max_steps=8, batch_size=12, warmup_steps=3, learning_rate=0.02, ema_decay=0.9, checkpoint_every=3, seed=4
)
FAILING = CONFIG.model_copy(update={"on_spike": "fail"})


class Net(nn.Module):
    """Blocks in a list, sizes that two workers cannot share evenly, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 7)])
        self.head = nn.Linear(7, 1)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x) * self.scale


class Regression:
    """A small `Trainable` that remembers which positions it was shown."""

    columns = ("img_emb",)

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def build(self) -> nn.Module:
        return Net()

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        self.seen.append(batch["position"].tolist())
        target = batch["img_emb"].sum(1) + 0.1 * draws.normal("target")
        return (model(batch["img_emb"])[:, 0] - target).square().float()

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        assert not model.training
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "weights.safetensors")
        return {"parameters": sum(p.numel() for p in model.parameters())}


class Spoiled(Regression):
    """From step `at` on something is not a number: the loss, or the gradient of a finite loss."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.at, self.what = at, what

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        loss = super().loss(model, batch, draws)
        if len(self.seen) < self.at:
            return loss
        return loss * float("nan") if self.what == "loss" else loss + (loss * 0).sqrt()


def _batches(config: TrainConfig = CONFIG, last_step: int = 10**9) -> loop.Batches:
    """Endless batches of this rank; a smaller `last_step` ends them there, as a kill would end the run."""
    per_rank = config.batch_size // distributed.world_size()

    def from_step(first_step: int) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            position = step * config.batch_size + distributed.rank() * per_rank + torch.arange(per_rank)
            yield {"img_emb": torch.sin(position[:, None] * torch.arange(1, 4)).float(), "position": position}

    return from_step


def _train(folder: Path, config: TrainConfig = CONFIG, last_step: int = 10**9, **more: Any) -> TrainState:
    trainable = more.pop("trainable", None) or Regression()
    return loop.train(trainable, _batches(config, last_step), config, folder, identity="one", **more)


def _timeless(curve: list[dict[str, float]] | None) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in window.TIMES} for row in curve or []]


def _weights(state: TrainState) -> dict[str, Tensor]:
    return {
        **checkpoint.whole_weights(state.model),
        **{f"ema.{k}": v for k, v in state.ema.state_dict().items()},
    }


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_training_makes_exactly_its_steps_on_consecutive_positions(tmp_path: Path, steps: int) -> None:
    trainable, config = Regression(), CONFIG.model_copy(update={"max_steps": steps})
    state = _train(tmp_path, config, trainable=trainable)
    assert state.clock == steps == len(trainable.seen)
    assert trainable.seen == [list(range(12 * k, 12 * k + 12)) for k in range(steps)]
    assert {int(s["step"]) for s in state.optimizer.state.values()} == {steps}


def test_training_a_finished_run_again_does_no_step_and_gives_the_same_state(tmp_path: Path) -> None:
    finished, again = _train(tmp_path), Regression()
    state = _train(tmp_path, trainable=again)
    assert again.seen == [] and state.clock == 8
    assert _equal(_weights(state), _weights(finished)) and state.curve == finished.curve


def test_training_learns_and_the_seed_decides_the_result(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 60})
    one, two = _train(tmp_path / "1", config), _train(tmp_path / "2", config)
    assert _equal(_weights(one), _weights(two)) and _timeless(one.curve) == _timeless(two.curve)
    assert one.curve and one.curve[-1]["loss"] < 0.5 * one.curve[0]["loss"]
    other = _train(tmp_path / "3", config.model_copy(update={"seed": 5}))
    assert not torch.equal(_weights(other)["head.weight"], _weights(one)["head.weight"])


def test_the_curve_has_a_row_per_interval_and_one_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 3)
    reports: list[loop.Row] = []
    state = _train(tmp_path, report=reports.append)
    assert state.curve and [row["step"] for row in state.curve] == [3, 6, 8]
    assert [row["samples"] for row in state.curve] == [36, 72, 96]
    rates = [optim.learning_rate(step - 1, CONFIG) for step in (3, 6, 8)]
    assert [row["learning_rate"] for row in state.curve] == rates
    assert _timeless(reports) == state.curve, "what is kept has no times"
    assert all(r["samples_per_second"] == r["samples_per_second_per_device"] > 0 for r in reports)
    assert all(0 <= r["data_wait"] <= 1 for r in reports)


def test_a_row_is_the_mean_loss_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)
    each = [row["loss"] for row in _train(tmp_path / "each").curve or []]
    monkeypatch.setattr(window, "LOG_EVERY", 4)
    means = [row["loss"] for row in _train(tmp_path / "four").curve or []]
    assert means == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4])


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_parts_of_a_batch_one_after_the_other_make_the_step_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)
    whole = _train(tmp_path / "whole")
    trainable = Regression()
    state = _train(
        tmp_path / "parts", CONFIG.model_copy(update={"accumulate": accumulate}), trainable=trainable
    )
    size = 12 // accumulate
    assert trainable.seen == [list(range(k * size, (k + 1) * size)) for k in range(8 * accumulate)]
    for one, other in zip(state.curve or [], whole.curve or [], strict=True):
        assert (one["loss"], one["grad_norm"]) == pytest.approx((other["loss"], other["grad_norm"]), rel=1e-5)
    for name, tensor in _weights(state).items():
        torch.testing.assert_close(tensor, _weights(whole)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kills", [(1,), (3,), (5, 7), (3, 6, 8)])
def test_an_interrupted_run_ends_with_the_weights_and_the_curve_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: tuple[int, ...]
) -> None:
    monkeypatch.setattr(
        window, "LOG_EVERY", 5
    )  # no multiple of checkpoint_every: rows straddle the interruptions
    unbroken = _train(tmp_path / "unbroken")
    for last_step in kills:
        _train(tmp_path / "broken", last_step=last_step)
    resumed, rest = Regression(), max(k // 3 * 3 for k in kills if k < 8)
    state = _train(tmp_path / "broken", trainable=resumed)
    assert resumed.seen == [] if 8 in kills else resumed.seen[0][0] == 12 * rest
    assert _equal(_weights(state), _weights(unbroken))
    assert _timeless(state.curve) == _timeless(unbroken.curve) and len(state.curve or []) == 2


def test_a_notice_that_this_place_goes_is_answered_with_a_checkpoint_before_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 2)
    seen = Regression()
    config = CONFIG.model_copy(update={"checkpoint_every": 100})
    _train(tmp_path, config, trainable=seen, last_step=5, preempted=lambda: len(seen.seen) == 4)
    assert len(seen.seen) == 5 and [path.name for path in tmp_path.glob("step_*")] == ["step_00000004"]


def test_told_to_stop_it_saves_a_checkpoint_and_goes_on_from_there_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 2)
    config = CONFIG.model_copy(update={"checkpoint_every": 100})
    seen = Regression()
    state = _train(tmp_path / "stopped", config, trainable=seen, stopped=lambda: len(seen.seen) >= 3)
    assert state.clock == len(seen.seen) == 4 < config.max_steps
    assert [path.name for path in (tmp_path / "stopped").glob("step_*")] == ["step_00000004"]
    resumed = _train(tmp_path / "stopped", config)
    assert _equal(_weights(resumed), _weights(_train(tmp_path / "unbroken", config)))


@pytest.mark.parametrize(
    ("what", "step", "problem"), [("loss", 5, "norm is nan at step 5"), ("grad", 6, "norm is nan at step 6")]
)
def test_what_is_not_a_number_names_the_steps_and_is_never_saved(
    tmp_path: Path, what: str, step: int, problem: str
) -> None:
    for resumed_at in (0, 3):
        with pytest.raises(
            FloatingPointError, match=rf"{problem}: the largest loss is .*, of sample \d+; lower"
        ):
            _train(tmp_path, FAILING, trainable=Spoiled(step - resumed_at, what))
        assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000003"]


def test_a_gradient_that_is_no_number_at_the_last_step_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="norm is nan at step 8"):
        _train(tmp_path, FAILING, trainable=Spoiled(8, "grad"))


def test_what_is_published_is_the_average_and_training_weights_stay(tmp_path: Path) -> None:
    state = _train(tmp_path / "checkpoints")
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    facts = loop.publish(Regression(), state, tmp_path / "out")
    published = load_file(tmp_path / "out" / "weights.safetensors")
    averages = state.ema.state_dict()
    assert facts == {"parameters": 3 * 5 + 5 + 5 * 7 + 7 + 7 + 1}
    assert published.keys() == {*averages, "scale"} and published["scale"] == 0.5
    assert all(torch.equal(published[name], averages[name]) for name in averages)
    assert not torch.equal(published["head.weight"], before["head.weight"])
    assert all(torch.equal(p, before[name]) for name, p in state.model.named_parameters())


def test_a_checkpoint_of_another_computation_is_refused(tmp_path: Path) -> None:
    _train(tmp_path, last_step=3)
    with pytest.raises(ValueError, match="belongs to one, not to two"):
        loop.train(Regression(), _batches(), CONFIG, tmp_path, identity="two")


def test_bf16_is_for_arithmetic_and_weights_stay_fp32(tmp_path: Path) -> None:
    exact = _train(tmp_path / "fp32").curve
    state = _train(tmp_path / "bf16", CONFIG.model_copy(update={"precision": "bf16"}))
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert exact and state.curve and state.curve[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)
    assert state.curve[-1]["loss"] != exact[-1]["loss"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_optimizer_sees_clipped_gradients_and_the_norm_is_that_before(accumulate: int) -> None:
    config = CONFIG.model_copy(update={"clip_grad_norm": 0.05, "accumulate": accumulate})
    trainable = Regression()
    state = loop.build_state(trainable, config)
    seen: list[Tensor] = []

    def look(*_: Any) -> None:
        seen.append(
            torch.stack([p.grad.norm() for p in state.model.parameters() if p.grad is not None]).norm()
        )

    state.optimizer.register_step_pre_hook(look)
    batch = next(_batches(config)(0))
    _, norm = loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model)
    assert norm > 0.1, "it would prove nothing else"
    assert seen == [pytest.approx(0.05, rel=1e-4)]
    unclipped = loop.build_state(trainable, CONFIG)
    _, same = loop.step(trainable, unclipped, batch, CONFIG, spikes.NO_LIMIT, unclipped.model)
    assert float(norm) == pytest.approx(float(same), rel=1e-5)


class Slow(Regression):
    """Takes 50 ms for a loss."""

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        time.sleep(0.05)
        return super().loss(model, batch, draws)


@pytest.mark.parametrize("is_data_slow", [True, False])
def test_time_that_a_training_waits_for_its_data_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_data_slow: bool
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 4)

    def late(first_step: int) -> Iterator[Batch]:
        for batch in _batches()(first_step):
            time.sleep(0.05)
            yield batch

    reports: list[loop.Row] = []
    trainable, batches = (Regression(), late) if is_data_slow else (Slow(), _batches())
    loop.train(trainable, batches, CONFIG, tmp_path, identity="one", report=reports.append)
    assert len(reports) == 2
    assert all((row["data_wait"] > 0.5) == is_data_slow for row in reports)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_row_tells_the_operations_per_second_and_their_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    monkeypatch.setattr(flops, "peak_flops", lambda _: 1e12)
    rows: dict[str, loop.Row] = {}
    for precision in ("fp32", "bf16"):
        config = CONFIG.model_copy(update={"precision": precision, "accumulate": accumulate})
        _train(tmp_path / precision, config, report=lambda row, p=precision: rows.update({p: row}))
    per_sample = 4 * 3 * 5 + 6 * 5 * 7 + 6 * 7 * 1  # the first layer needs no gradient of its input
    for row in rows.values():
        assert row["flops_per_second_per_device"] == pytest.approx(per_sample * row["samples_per_second"])
    assert rows["bf16"]["mfu"] == pytest.approx(per_sample * rows["bf16"]["samples_per_second"] / 1e12)
    assert "mfu" not in rows["fp32"], "the peak is that of bf16"


Launch = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Runs two gloo workers to their end: (folder name, last step, **settings) -> what each rank recorded."""

    def run(name: str, last_step: int = 10**9, **settings: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, __file__, str(folder), json.dumps(settings), str(last_step)]
        environment = os.environ | world | {"PYTHONPATH": str(CHECKOUT)}
        workers = [subprocess.Popen(line, env={**environment, "RANK": str(rank)}) for rank in range(2)]
        try:
            assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
        finally:
            for worker in workers:
                worker.kill()
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]

    return run


def _single(folder: Path) -> tuple[TrainState, dict[str, Tensor]]:
    state = _train(folder / "checkpoints")
    loop.publish(Regression(), state, folder)
    return state, load_file(folder / "weights.safetensors")


def _assert_close(folder: Path, expected: dict[str, Tensor]) -> None:
    published = load_file(folder / "weights.safetensors")
    assert published.keys() == expected.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_workers_do_what_one_does_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch, fsdp: bool
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 1)
    alone, weights = _single(tmp_path / "one")
    ranks = launch("two", fsdp=fsdp)
    assert {rank["world_size"] for rank in ranks} == {2}
    together = [first + second for first, second in zip(*(rank["seen"] for rank in ranks), strict=True)]
    assert together == [list(range(12 * k, 12 * k + 12)) for k in range(8)]
    assert ranks[0]["curve"] == ranks[1]["curve"]
    for field in ("loss", "grad_norm", "learning_rate", "step"):
        expected = [row[field] for row in alone.curve or []]
        assert [row[field] for row in ranks[0]["curve"]] == pytest.approx(expected, rel=1e-5)
    assert ranks[0]["facts"] == {"parameters": 70} and ranks[1]["facts"] == {}
    _assert_close(tmp_path / "two", weights)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_of_two_workers_goes_on_with_one_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch, fsdp: bool
) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 5)
    alone, weights = _single(tmp_path / "one")
    ranks = launch("moving", last_step=4, fsdp=fsdp)
    assert [len(rank["seen"]) for rank in ranks] == [4, 4]
    _train(tmp_path / "moving" / "checkpoints", last_step=7)
    assert (tmp_path / "moving" / "checkpoints" / "LATEST").read_text() == "step_00000006"
    ranks = launch("moving", fsdp=fsdp)
    assert [rank["seen"][0][0] for rank in ranks] == [72, 78]
    assert [row["step"] for row in ranks[0]["curve"]] == [5, 8]
    losses = [row["loss"] for row in alone.curve or []]
    assert [row["loss"] for row in ranks[0]["curve"]] == pytest.approx(losses, rel=1e-5)
    _assert_close(tmp_path / "moving", weights)
    state, _ = _single(tmp_path / "moving")
    assert state.clock == 8, "a single process reads the final checkpoint of two"


def _work(folder: Path, settings: dict[str, Any], last_step: int) -> None:
    """One worker: trains, publishes, and records what it saw."""
    window.LOG_EVERY = 1 if folder.name == "two" else 5
    config, trainable = CONFIG.model_copy(update=settings), Regression()
    with distributed.process_group():
        state = _train(folder / "checkpoints", config, last_step, trainable=trainable)
        record = {
            "world_size": distributed.world_size(),
            "seen": trainable.seen,
            "curve": _timeless(state.curve),
            "facts": loop.publish(trainable, state, folder),
        }
        (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(record))
        distributed.barrier()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
