"""Longer trainings go on where shorter ones ended: with a constant learning rate, a step does not know how many follow it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data import storage
from data.config import fingerprint, result_fields
from training import checkpoint_facts
from training.systems.system import TrainConfig


@dataclass(frozen=True)
class Donor:
    """A checkpoint of a shorter training that is also one of this training."""

    path: Path
    step: int
    artifact: str
    """The fingerprint of the training that wrote it."""


def trajectory(name: str, version: int, config: TrainConfig, inputs: Mapping[str, str]) -> str:
    """Names the sequence of training states; `inputs` are role -> content digest of what is read.

    Trainings that differ in `max_steps` alone share it when their schedule is constant.
    """
    fields = result_fields(config)
    if is_open_ended(config):
        del fields["max_steps"]
    return fingerprint(name, version, fields, dict(inputs))


def is_open_ended(config: TrainConfig) -> bool:
    """Whether every step is the same step however many follow."""
    return config.schedule == "constant" and config.warmup_steps <= config.max_steps


def donor(folder: str, config: TrainConfig, identity: str) -> Donor | None:
    """The most advanced checkpoint of `identity` among the artifacts beside `folder` that this training can go on from.

    A shorter training's last checkpoint is not one: its curve was closed there, which a longer one would not do.
    """
    if not is_open_ended(config) or not storage.is_local(folder):
        return None
    here = storage.local_path(folder)
    found = []
    for path in here.parent.glob("*/checkpoints/step_*"):
        if path.parents[1] == here:
            continue
        try:
            facts = checkpoint_facts.read(path)
        except (OSError, ValueError):
            continue
        last = min(facts.get("max_steps") or 0, config.max_steps)
        if facts["identity"] == identity and facts["clock"] < last:
            found.append(Donor(path, facts["clock"], path.parents[1].name))
    return max(found, key=lambda each: each.step, default=None)


def keep_for_others(folder: Path, config: TrainConfig) -> None:
    """Of a finished training's checkpoints under `folder`, keeps what a longer one could go on from: the newest before the last."""
    if not is_open_ended(config):
        shutil.rmtree(folder, ignore_errors=True)
        return
    steps = sorted(folder.glob("step_*"))
    earlier = [step for step in steps if step.name < f"step_{config.max_steps:08d}"]
    (folder / "LATEST").unlink(missing_ok=True)
    for step in set(steps) - set(earlier[-1:]):
        shutil.rmtree(step)


def adopt(given: Donor, folder: Path) -> None:
    """A copy of the donor's checkpoint under `folder`, where this training looks for its own."""
    draft = folder / f".tmp-{given.path.name}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(given.path, draft)
    draft.rename(folder / given.path.name)
