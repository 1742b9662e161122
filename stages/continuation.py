"""Longer trainings go on where shorter ones ended: with a constant learning rate, a step does not know how many follow it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.parquet as pq

from data import storage
from data.config import fingerprint, result_fields
from training import checkpoint_facts
from training.systems.system import TrainConfig


@dataclass(frozen=True)
class Donor:
    """A checkpoint of a shorter training that is also one of this training."""

    path: str
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
    if not is_open_ended(config):
        return None
    family, _, own = folder.rstrip("/").rpartition("/")
    found = []
    for name in storage.list_folders(family):
        place = storage.join(family, name, "checkpoints")
        for step in storage.list_folders(place) if name != own else ():
            try:
                facts = checkpoint_facts.read(storage.join(place, step))
            except (OSError, ValueError):
                continue
            last = min(facts.get("max_steps") or 0, config.max_steps)
            if facts["identity"] == identity and facts["clock"] < last:
                found.append(Donor(storage.join(place, step), facts["clock"], name))
    return max(found, key=lambda each: each.step, default=None)


def keep_for_others(folder: str, config: TrainConfig) -> None:
    """Of a finished training's checkpoints under `folder`, keeps what a longer one could go on from, the newest before the last,
    and the one of the lowest held-out loss where that is lower than at the end.
    """
    steps = [name for name in storage.list_folders(folder) if name.startswith("step_")]
    earlier = [name for name in steps if name < f"step_{config.max_steps:08d}"]
    kept = {*_best(folder, steps), *(earlier[-1:] if is_open_ended(config) else [])}
    if not kept:
        storage.remove_tree(folder)
        return
    storage.remove(storage.join(folder, checkpoint_facts.LATEST))
    for name in set(steps) - kept:
        storage.remove_tree(storage.join(folder, name))


def _best(folder: str, steps: Sequence[str]) -> list[str]:
    """The checkpoint of the lowest held-out loss, unless it is the last one, whose weights are published."""
    losses = {}
    for name in steps:
        with suppress(OSError, ValueError):
            losses[name] = checkpoint_facts.read(storage.join(folder, name)).get("validation_loss")
    known = {name: loss for name, loss in losses.items() if loss is not None}
    best = min(known, key=lambda name: (known[name], name), default=None)
    return [best] if best and known[best] < known.get(steps[-1], math.inf) else []


def adopt(given: Donor, folder: str) -> None:
    """A copy of the donor's checkpoint under `folder`, where this training looks for its own; what makes it one comes last.

    The donor's metrics up to there come before it, and stand beside `folder` as this training's own.
    """
    _adopt_metrics(given, folder)
    target = storage.join(folder, given.path.rsplit("/", 1)[1])
    names = [name for name in storage.list_files(given.path) if name != checkpoint_facts.FILE]
    for name in [*names, checkpoint_facts.FILE]:
        storage.copy(storage.join(given.path, name), storage.join(target, name))


def _adopt_metrics(given: Donor, folder: str) -> None:
    """Rows up to the donor's step; events whole, since the first one that follows tells readers to pass over what is later."""
    theirs = storage.join(given.path.rsplit("/", 2)[0], "_meta")
    ours = storage.join(folder.rsplit("/", 1)[0], "_meta")
    rows = storage.join(theirs, "metrics.parquet")
    if storage.exists(rows):
        buffer, table = io.BytesIO(), pq.read_table(io.BytesIO(storage.read_bytes(rows)))
        pq.write_table(table.filter(pc.field("step") <= given.step), buffer)
        storage.write_bytes(storage.join(ours, "metrics.parquet"), buffer.getvalue())
    for name in storage.list_files(storage.join(theirs, "tensorboard")):
        storage.copy(storage.join(theirs, "tensorboard", name), storage.join(ours, "tensorboard", name))
