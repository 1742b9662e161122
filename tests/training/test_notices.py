"""A notice is heard within seconds however slow a step is, by all ranks at the same step, and costs fast steps nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from torch import Tensor, nn

from training import checkpoint_facts, distributed, notices
from training.randomness import Draws
from training.systems.system import Batch

sys.path.insert(0, str(Path(__file__).parent))
import worlds
from test_loop import CONFIG, Regression, _train

LONG = CONFIG.model_copy(update={"max_steps": 200, "checkpoint_every": 1000})


class Slow(Regression):
    """Takes `seconds` for each step."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        time.sleep(self.seconds)
        return super().loss(model, batch, draws)


@pytest.mark.parametrize("told", ["stopped", "preempted"])
def test_slow_steps_are_asked_between_two_looks_at_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    monkeypatch.setattr(notices, "EVERY_SECONDS", 0.1)
    seen = Slow(0.04)

    def is_told() -> bool:
        return len(seen.seen) >= 5 and not list(tmp_path.glob("step_*"))

    state = _train(tmp_path, LONG, 18, trainable=seen, **{told: is_told})
    (first,) = [int(path.name[5:]) for path in tmp_path.glob("step_*")]
    assert 5 <= first < 16 and not state.curve, "no row is closed before its time"
    assert state.clock == (first if told == "stopped" else 18)


def test_fast_steps_are_asked_once_more_than_the_loss_is_looked_at(tmp_path: Path) -> None:
    asked: list[int] = []
    seen = Regression()

    def asks() -> bool:
        asked.append(len(seen.seen))
        return False

    _train(tmp_path, LONG, trainable=seen, stopped=asks)
    assert asked == [1, *range(20, 201, 20)]


def step_until_the_second_rank_is_told(folder: str) -> None:
    """One of two ranks, whose own clocks would each have it ask at other steps."""
    notices.EVERY_SECONDS = 0.05 if distributed.rank() else 0.2
    seen = Slow(0.02)
    state = _train(
        Path(folder) / "checkpoints",
        LONG,
        trainable=seen,
        stopped=lambda: distributed.rank() == 1 and len(seen.seen) >= 8,
    )
    (Path(folder) / f"rank{distributed.rank()}").write_text(json.dumps(state.clock))


@pytest.mark.slow
def test_all_ranks_end_at_the_same_step_whichever_was_told(tmp_path: Path) -> None:
    worlds.run(__file__, "step_until_the_second_rank_is_told", 2, str(tmp_path))
    ended = {json.loads((tmp_path / f"rank{rank}").read_text()) for rank in range(2)}
    assert len(ended) == 1 and 8 <= (step := ended.pop()) < 40
    assert checkpoint_facts.latest(str(tmp_path / "checkpoints")) == f"step_{step:08d}"
