"""Steps whose gradient is no number or far from usual: they change no weight, and they are named.

The step itself compares on the device and never waits: the optimizer is told `found_inf` as a gradient scaler would tell it.
The gradient's global norm is the same on every rank, so every rank skips the same steps.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training import distributed
from training.randomness import Draws
from training.systems.system import DiffusionTrainable, Trainable, TrainConfig

log = logging.getLogger("darkroom.train")

KeyOf = Callable[[int], str]
"""A position of the training stream -> the `__key__` of the sample there."""

NO_LIMIT = torch.finfo(torch.float32).max
USUAL_ROWS, FEWEST_ROWS = 10, 3
"""Newest rows of the curve whose median gradient norm is the usual one, and how many it takes to know."""
RECENT_ROWS = 50
"""Rows over which skipped steps count against `max_skips`: 1,000 steps."""
MAX_ROLLBACKS = 3
TIMESTEP_BINS = 8


class Diverged(FloatingPointError):
    """More steps were skipped than `max_skips` allows; a rollback may help."""


def norm_limit(curve: Sequence[dict[str, Any]], factor: float | None) -> float:
    """The largest gradient norm that a step may have, exact in float32: `factor` times the usual, or any finite one."""
    norms = [row["grad_norm"] for row in curve[-USUAL_ROWS:] if math.isfinite(row["grad_norm"])]
    if factor is None or len(norms) < FEWEST_ROWS:
        return NO_LIMIT
    return min(NO_LIMIT, float(torch.tensor(factor * statistics.median(norms), dtype=torch.float32)))


def found_inf(grad_norm: Tensor, limit: float) -> Tensor:
    """1.0 where a step of this norm () must change nothing, else 0.0, on the norm's device."""
    return (~(grad_norm <= limit)).float()  # also of a norm that is no number


def described(
    step: int,
    loss: float,
    norm: float,
    held: tuple[Tensor, Tensor, Tensor],
    trainable: Trainable,
    config: TrainConfig,
    key_of: KeyOf,
) -> str:
    """One bad step in words: its number, and the sample of the largest loss with its timestep bin. Collective."""
    losses, _, positions = held
    worst = losses.float().nan_to_num(nan=math.inf).argmax()
    found = distributed.gathered((float(losses[worst]), int(positions[worst])))
    value, position = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    where = f"the largest loss is {value:.4g}, of sample {key_of(position)}"
    if isinstance(trainable, DiffusionTrainable):
        t = trainable.timesteps(Draws(config.seed, positions.new_tensor([position])))
        width = 1000 // TIMESTEP_BINS
        low = int(t) // width * width
        where += f" at a timestep of [{low}, {low + width})"
    return f"the loss is {loss:.4g} and the gradient's norm is {norm:.4g} at step {step}: {where}"


def tell(found: list[str], config: TrainConfig) -> None:
    """Warns of skipped steps; raises FloatingPointError of the first where `on_spike` is "fail"."""
    if found and config.on_spike == "fail":
        raise FloatingPointError(f"{found[0]}; lower the learning rate, or set on_spike to skip or rollback")
    for sentence in found:
        log.warning("step skipped: %s", sentence)


def judge(curve: Sequence[dict[str, Any]], config: TrainConfig) -> None:
    """Raises Diverged when more than `max_skips`, or half, of the newest 1,000 steps since a rollback were skipped."""
    first = max((i + 1 for i, row in enumerate(curve) if row["rollbacks"]), default=0)
    first = max(first, len(curve) - RECENT_ROWS)
    skipped = sum(row["skipped"] for row in curve[first:])
    steps = sum(row["steps"] for row in curve[first:])
    if skipped > min(config.max_skips, steps // 2):
        raise Diverged(
            f"{skipped} of the {steps} steps up to step {curve[-1]['step']} were skipped (max_skips is {config.max_skips}, and "
            "half of them too many): lower the learning rate, or look at the samples that were named"
        )


def rolled_back(curve: list[dict[str, Any]] | None, error: Diverged) -> list[dict[str, Any]]:
    """The curve of the checkpoint returned to, with the return noted in its last row. Raises `error` when it is one too many."""
    if not curve:
        raise error
    done = sum(row["rollbacks"] for row in curve)
    if done >= MAX_ROLLBACKS:
        raise Diverged(f"{error}; {done} returns to an earlier checkpoint did not help") from error
    return [*curve[:-1], {**curve[-1], "rollbacks": curve[-1]["rollbacks"] + 1}]
