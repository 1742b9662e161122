"""Which failures of a training start it anew: those of a place, while checkpoints advance, and never those of the work itself."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from data.errors import StageFailed, UserError
from stages import restarts
from stages.trainer import WhileItAdvances

DEATH = WorkerGroupError("rank 0 died", {0: ActorDiedError()})
NO_START = ControllerError(RuntimeError("no start"))


@pytest.fixture
def policy(tmp_path: Path) -> WhileItAdvances:
    limits = FailureConfig(max_failures=restarts.IN_A_ROW, controller_failure_limit=restarts.IN_A_ROW)
    return WhileItAdvances(limits, str(tmp_path), {})


def _restarted(policy: WhileItAdvances, error: WorkerGroupError = DEATH) -> bool:
    return policy.make_decision(error) is FailureDecision.RETRY


def test_the_fourth_death_without_a_newer_checkpoint_is_the_end(policy: WhileItAdvances) -> None:
    assert [_restarted(policy) for _ in range(4)] == [True, True, True, False]


def test_while_checkpoints_advance_deaths_are_not_counted(policy: WhileItAdvances, tmp_path: Path) -> None:
    for step in range(100, 1100, 100):
        (tmp_path / "LATEST").write_text(f"step_{step:08d}")
        assert _restarted(policy) and _restarted(policy)
    assert [_restarted(policy) for _ in range(2)] == [True, False], "the one of step 1,000 was there before"


def test_a_checkpoint_from_before_this_start_is_no_advance(tmp_path: Path) -> None:
    (tmp_path / "LATEST").write_text("step_00000100")
    policy = WhileItAdvances(FailureConfig(max_failures=1), str(tmp_path), {})
    assert [_restarted(policy) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "cause",
    [
        FloatingPointError("the norm is nan at step 5"),
        UserError("set log_to"),
        OSError(errno.ENOSPC, "no space left"),
    ],
)
def test_what_would_fail_again_is_not_tried_again_and_told_though_others_failed_of_it(
    policy: WhileItAdvances, cause: Exception
) -> None:
    error = WorkerGroupError("both", {0: RuntimeError("Connection closed by peer"), 1: cause})
    assert not _restarted(policy, error)
    assert restarts.told(error) is cause


def test_what_is_told_of_workers_that_died_says_that_it_was_tried() -> None:
    told = restarts.told(DEATH)
    assert isinstance(told, StageFailed)
    assert str(told).startswith("training failed: ActorDiedError: ")
    assert str(told).endswith("(3 restarts in a row brought no newer checkpoint)")
    lost = ConnectionResetError("reset")
    assert restarts.told(WorkerGroupError("", {0: RuntimeError("closed"), 1: lost})) is lost
    assert str(restarts.told(NO_START)) == "training failed: RuntimeError: no start"
