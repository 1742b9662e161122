"""Weights & Biases and MLflow themselves take what a training tells them, without a server and without a network."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
CHECKOUT = Path(__file__).parents[2]

TRAINING = """
import sys
sys.path.append(sys.argv[1])
from training.sinks import Sinks
folder, service, first, last = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
kept = Sinks(folder, service, run="vae-1a", config={"max_steps": last, "seed": 1})
for step in range(first, last + 1, 20):
    kept.write({"step": step, "loss": 1 / step, "device": "cpu"})
kept.close()
"""
Train = Callable[[int, int], None]


@pytest.fixture
def trained_with(environment, tmp_path) -> Callable[..., Train]:
    """(service, requirement, **variables) -> a training from one step to another, as far as its sinks see one, in a process of
    its own where the service's library is the real one."""

    def with_service(service: str, requirement: str, **variables: str) -> Train:
        python = environment(service, requirement)
        ours = sysconfig.get_paths()["purelib"]

        def train(first: int, last: int) -> None:
            done = subprocess.run(
                [python, "-c", TRAINING, ours, str(tmp_path / "meta"), service, str(first), str(last)],
                env=os.environ | variables | {"PYTHONPATH": str(CHECKOUT), "PYTHONWARNINGS": "ignore"},
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert "and the training goes on" not in done.stderr, done.stderr[-3000:]

        return train

    return with_service


def test_mlflow_has_one_run_of_a_training_that_was_resumed(trained_with, tmp_path):
    runs = tmp_path / "mlruns"
    train = trained_with(
        "mlflow", "mlflow-skinny==3.17.2", MLFLOW_TRACKING_URI=runs.as_uri(), MLFLOW_ALLOW_FILE_STORE="true"
    )
    train(20, 60)
    train(40, 80)
    (losses,) = runs.glob("*/*/metrics/loss")
    told = [(float(value), int(step)) for _, value, step in map(str.split, losses.read_text().splitlines())]
    assert told == [(1 / step, step) for step in (20, 40, 60, 40, 60, 80)]
    assert (losses.parents[1] / "params" / "max_steps").read_text() == "60"


def test_wandb_has_the_same_run_after_a_resume(trained_with, tmp_path):
    train = trained_with("wandb", "wandb==0.31.0", WANDB_MODE="offline")
    train(20, 60)
    train(40, 80)
    kept = sorted((tmp_path / "meta" / "wandb").glob("offline-run-*/run-vae-1a.wandb"))
    assert len(kept) == 2, "one file for each process, to be sent by `wandb sync` to one run"
    assert all(b"loss" in file.read_bytes() and b"max_steps" in file.read_bytes() for file in kept)
