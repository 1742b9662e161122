"""Steps that must change nothing: found on the device, named, and answered by policy."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from training import distributed, loop, spikes, window
from training.checkpoint import TrainState
from training.randomness import Draws
from training.sinks import Sinks
from training.systems.system import Batch, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
import worlds

CONFIG = TrainConfig(
    max_steps=12,
    batch_size=4,
    schedule="constant",
    warmup_steps=0,
    learning_rate=0.01,
    checkpoint_every=4,
    ema_decay=0.9,
)


class Poisoned:
    """Regression whose samples at the positions `bad` multiply the loss by `factor`; each has a timestep."""

    columns = ("img_emb",)

    def __init__(self, bad: set[int], factor: float = math.nan) -> None:
        self.bad, self.factor = torch.tensor(sorted(bad)), factor

    def build(self) -> nn.Module:
        return nn.Linear(3, 1)

    def timesteps(self, draws: Draws) -> Tensor:
        return (10.0 * draws.index).fmod(1000)

    def loss(self, model: nn.Module, batch: Batch, _draws: Draws, _t: Tensor | None = None) -> Tensor:
        loss = (model(batch["img_emb"])[:, 0] - batch["img_emb"].sum(1)).square()
        return loss * torch.where(torch.isin(batch["position"], self.bad), self.factor, 1.0)

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        raise NotImplementedError


def _batches(first_step: int) -> Any:
    """This rank's share of each four samples."""
    for step in range(first_step, 10**9):
        share = 4 // distributed.world_size()
        position = step * 4 + distributed.rank() * share + torch.arange(share)
        yield {"img_emb": torch.sin(position[:, None] * torch.arange(1, 4)).float(), "position": position}


def _train(folder: Path, trainable: Poisoned, report: Any = lambda _: None, **changes: Any) -> TrainState:
    config = CONFIG.model_copy(update=changes)
    return loop.train(
        trainable,  # type: ignore[arg-type]
        _batches,
        config,
        folder,
        identity="one",
        report=report,
        key_of=lambda p: f"key{p:03d}",
    )


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "LOG_EVERY", 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.5])
def test_a_norm_that_is_no_number_or_above_the_limit_is_found(bad: float) -> None:
    assert spikes.found_inf(torch.tensor(bad), 2.0) == 1
    assert spikes.found_inf(torch.tensor(2.0), 2.0) == 0
    if not math.isfinite(bad):
        assert spikes.found_inf(torch.tensor(bad), spikes.NO_LIMIT) == 1


def test_the_limit_is_a_multiple_of_the_median_of_the_newest_rows() -> None:
    curve = [{"grad_norm": norm} for norm in (900.0, *[1.0, 2.0, 3.0] * 3, math.nan, 2.0)]
    assert spikes.norm_limit(curve, 10.0) == 20
    assert spikes.norm_limit(curve[:2], 10.0) == spikes.norm_limit(curve, None) == spikes.NO_LIMIT


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_poisoned_sample_costs_its_step_and_nothing_else(tmp_path: Path, factor: float, caplog) -> None:
    poisoned = Poisoned({22}, factor)
    five = _train(tmp_path / "5", poisoned, max_steps=5)
    six = _train(tmp_path / "6", poisoned, max_steps=6)  # its last step is that of positions 20 to 23
    for one, other in zip(five.model.parameters(), six.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {int(s["step"]) for s in six.optimizer.state.values()} == {5}
    rows = _train(tmp_path / "12", poisoned).curve or []
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert all(math.isfinite(row["loss"]) for row in rows), "a row is the mean of the steps that were made"
    (message,) = {r.message for r in caplog.records if "skipped" in r.message}
    assert "at step 6: the largest loss is" in message
    assert "of sample key022 at a timestep of [125, 250)" in message, "position 22 has timestep 220"


def test_a_spike_is_a_multiple_of_what_is_usual(tmp_path: Path) -> None:
    poisoned = Poisoned({4 * 9}, 1e4)
    assert sum(row["skipped"] for row in _train(tmp_path / "any", poisoned).curve or []) == 0
    rows = _train(tmp_path / "limited", poisoned, spike_factor=50.0).curve or []
    assert [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 0]


def test_fail_ends_the_training_at_the_next_look(tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError, match=r"at step 6: .* of sample key022 .*; lower the learning rate"
    ):
        _train(tmp_path, Poisoned({22}), on_spike="fail")


def test_too_many_skips_fail_clearly(tmp_path: Path) -> None:
    with pytest.raises(spikes.Diverged, match=r"3 of the 8 steps up to step 8 were skipped \(max_skips is 2"):
        _train(tmp_path, Poisoned({16, 20, 28}), max_skips=2)


def test_a_training_that_skips_every_step_does_not_pass_for_one(tmp_path: Path) -> None:
    with pytest.raises(spikes.Diverged, match="2 of the 2 steps"):
        _train(tmp_path, Poisoned(set(range(100))), max_skips=1000)


def test_a_rollback_returns_to_the_last_checkpoint_and_goes_on_with_later_samples(tmp_path: Path) -> None:
    poisoned = Poisoned({16, 20, 24})  # steps 5, 6 and 7
    four = _train(tmp_path / "four", poisoned, max_steps=4)
    state = _train(tmp_path / "all", poisoned, on_spike="rollback", max_skips=1)
    assert state.clock == 12 and state.curve
    assert [row["step"] for row in state.curve] == [2, 4, 8, 10, 12], "the row of step 6 went with its steps"
    assert [row["rollbacks"] for row in state.curve] == [0, 1, 0, 0, 0]
    assert {int(s["step"]) for s in state.optimizer.state.values()} == {4 + 5}, "5 to 7 are not made"
    assert four.curve and state.curve[1]["loss"] == four.curve[1]["loss"]


def test_a_rollback_is_told_and_what_is_kept_of_the_rows_is_the_curve(tmp_path: Path) -> None:
    kept, told = Sinks(str(tmp_path / "_meta")), []

    def report(row: dict[str, Any]) -> None:
        told.append(row)
        kept.write(row)

    state = _train(tmp_path / "checkpoints", Poisoned({16, 20, 24}), report, on_spike="rollback", max_skips=1)
    kept.close()
    rows = pq.read_table(tmp_path / "_meta" / "metrics.parquet").to_pylist()
    timeless = [{name: value for name, value in row.items() if name not in window.TIMES} for row in rows]
    assert timeless == state.curve and timeless[1]["rollbacks"] == 1
    assert [row["step"] for row in told] == [2, 4, 4, 8, 10, 12], "step 6 diverged before it was told"
    assert told[2] == {**told[1], "rollbacks": 1}, "with the times that it had"


def test_a_rollback_to_a_row_of_an_earlier_process_is_told_without_its_times(tmp_path: Path) -> None:
    _train(tmp_path, Poisoned(set()), max_steps=4)
    told: list[dict[str, Any]] = []
    _train(tmp_path, Poisoned({16, 20, 24}), told.append, on_spike="rollback", max_skips=1)
    assert [(row["step"], row["rollbacks"]) for row in told] == [(4, 1), (8, 0), (10, 0), (12, 0)]
    assert math.isnan(told[0]["samples_per_second"])


def test_rollbacks_that_do_not_help_end_it(tmp_path: Path) -> None:
    with pytest.raises(spikes.Diverged, match="3 returns to an earlier checkpoint did not help"):
        _train(tmp_path, Poisoned(set(range(16, 400))), on_spike="rollback", max_skips=1, max_steps=100)


ON_RANK_1 = {
    "skip": ({"on_spike": "skip"}, {22}, 11),
    "rollback": ({"on_spike": "rollback", "max_skips": 1}, {18, 22, 26}, 9),
}
"""What to do -> (settings, poisoned positions, steps that are made); of two ranks, the second has these positions."""


def _survived(folder: Path, what: str, **changes: Any) -> dict[str, Any]:
    """What is left of a training with poisoned samples."""
    settings, bad, _ = ON_RANK_1[what]
    state = _train(folder, Poisoned(bad), **settings, **changes)
    whole = {name: distributed.whole(p) for name, p in distributed.unwrap(state.model).named_parameters()}
    return {
        "weights": {name: tensor.tolist() for name, tensor in whole.items()},
        "averages": {name: distributed.whole(p).tolist() for name, p in state.ema.state_dict().items()},
        "steps": sorted({int(s["step"]) for s in state.optimizer.state.values()}),
        "curve": state.curve,
    }


def survive(folder: str) -> None:
    """Leaves what each rank of a world has after such trainings, replicated and sharded."""
    window.LOG_EVERY = 2
    for what in ON_RANK_1:
        for fsdp in (False, True):
            name = f"{what}-{fsdp}"
            ranks = distributed.gathered(_survived(Path(folder) / name, what, fsdp=fsdp))
            (Path(folder) / f"{name}.json").write_text(json.dumps(ranks))


@pytest.mark.slow
def test_samples_that_one_rank_has_alone_cost_every_rank_the_same_steps(tmp_path: Path) -> None:
    worlds.run(__file__, "survive", 2, str(tmp_path))
    for what, (_, _, made) in ON_RANK_1.items():
        alone = _survived(tmp_path / "alone" / what, what)
        assert alone["steps"] == [made]
        for fsdp in (False, True):
            first, second = json.loads((tmp_path / f"{what}-{fsdp}.json").read_text())
            assert first == second, "the ranks agree to the bit"
            assert first["steps"] == [made]
            for part in ("weights", "averages"):
                for name, values in alone[part].items():
                    torch.testing.assert_close(torch.tensor(first[part][name]), torch.tensor(values))
            for row, expected in zip(first["curve"], alone["curve"], strict=True):
                assert row.pop("validation_loss") is None
                assert row == pytest.approx({name: expected[name] for name in row}, rel=1e-5)
