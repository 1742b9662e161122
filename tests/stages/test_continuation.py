"""A longer training goes on from a shorter one exactly where that is the same computation, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stages import continuation
from training import checkpoint, loop
from training.sinks import Sinks, rows_at
from training.systems.system import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from test_loop import Regression, _batches, _equal, _weights

SHORT = TrainConfig(
    schedule="constant",
    max_steps=50,
    batch_size=12,
    warmup_steps=3,
    learning_rate=0.02,
    checkpoint_every=30,
    seed=4,
)
LONG = SHORT.model_copy(update={"max_steps": 70})
INPUTS = {"data": "digest"}


def _identity(config: TrainConfig) -> str:
    return continuation.trajectory("net", 1, config, INPUTS)


def _train(folder: Path, config: TrainConfig, trainable: Regression | None = None) -> loop.TrainState:
    return loop.train(
        trainable or Regression(),
        _batches(config),
        config,
        folder / "checkpoints",
        identity=_identity(config),
    )


def test_extended_is_as_if_it_had_been_long_from_the_start(tmp_path: Path) -> None:
    _train(tmp_path / "short", SHORT)
    given = continuation.donor(str(tmp_path / "long"), LONG, _identity(LONG))
    assert given is not None and (given.step, given.artifact) == (30, "short")
    continuation.adopt(given, str(tmp_path / "long" / "checkpoints"))
    seen = Regression()
    extended, unbroken = _train(tmp_path / "long", LONG, seen), _train(tmp_path / "unbroken", LONG)
    assert len(seen.seen) == 40 and _equal(_weights(extended), _weights(unbroken))
    rows = [[(row["step"], row["loss"]) for row in state.curve or []] for state in (extended, unbroken)]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == [20, 40, 60, 70], "no row at the old end"


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": 0.01},
        {"seed": 5},
        {"schedule": "cosine"},
        {"max_steps": 25},
        {"max_steps": 60, "warmup_steps": 65},
    ],
)
def test_another_computation_or_a_shorter_one_finds_nothing(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    _train(tmp_path / "short", SHORT)
    config = LONG.model_copy(update=changes)
    assert continuation.donor(str(tmp_path / "other"), config, _identity(config)) is None


def test_how_a_training_runs_does_not_name_it_and_its_inputs_do() -> None:
    assert _identity(LONG) == _identity(SHORT) == _identity(SHORT.model_copy(update={"num_workers": 3}))
    assert continuation.trajectory("net", 1, SHORT, {"data": "other"}) != _identity(SHORT)
    cosine = SHORT.model_copy(update={"schedule": "cosine"})
    assert _identity(cosine) != _identity(cosine.model_copy(update={"max_steps": 70}))


def test_a_damaged_donor_is_passed_over(tmp_path: Path) -> None:
    _train(tmp_path / "short", SHORT)
    (tmp_path / "short" / "checkpoints" / "step_00000030" / "state.json").write_text("{")
    assert continuation.donor(str(tmp_path / "long"), LONG, _identity(LONG)) is None


def test_what_is_told_of_a_training_goes_on_with_it(tmp_path: Path) -> None:
    (meta := tmp_path / "short" / "_meta").mkdir(parents=True)
    told = Sinks(str(meta))
    loop.train(
        Regression(),
        _batches(SHORT),
        SHORT,
        tmp_path / "short" / "checkpoints",
        identity=_identity(SHORT),
        report=told.write,
    )
    told.close()
    given = continuation.donor(str(tmp_path / "long"), LONG, _identity(LONG))
    assert given and [row["step"] for row in rows_at(str(meta / "metrics.parquet"))] == [20, 40, 50]
    continuation.adopt(given, str(tmp_path / "long" / "checkpoints"))
    adopted = rows_at(str(tmp_path / "long" / "_meta" / "metrics.parquet"))
    assert adopted == rows_at(str(meta / "metrics.parquet"))[:1]
    events = [path.name for path in (meta / "tensorboard").iterdir()]
    assert events == [path.name for path in (tmp_path / "long" / "_meta" / "tensorboard").iterdir()]


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ((0.5, 0.3, 0.4), ["step_00000020"]),
        ((0.5, 0.4, 0.3), []),
        ((0.3, 0.3, 0.3), []),
        ((None, None, None), []),
    ],
)
def test_the_checkpoint_of_the_lowest_held_out_loss_stays_unless_it_is_the_last(
    tmp_path: Path, losses: tuple[float | None, ...], kept: list[str]
) -> None:
    state = loop.build_state(Regression(), config := SHORT.model_copy(update={"schedule": "cosine"}))
    for state.clock, loss in zip((10, 20, config.max_steps), losses, strict=True):
        state.curve = [*(state.curve or []), {"step": state.clock, "validation_loss": loss}]
        checkpoint.save(tmp_path, state, "one")
    continuation.keep_for_others(str(tmp_path), config)
    assert [path.name for path in tmp_path.glob("*")] == kept


def test_a_finished_training_keeps_one_checkpoint_to_go_on_from_or_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for schedule, kept in (("constant", ["step_00000030"]), ("cosine", [])):
        config = SHORT.model_copy(update={"schedule": schedule})
        _train(tmp_path / schedule, config)
        folder = tmp_path / schedule / "checkpoints"
        continuation.keep_for_others(str(folder), config)
        assert [path.name for path in folder.glob("step_*")] == kept
