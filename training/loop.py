"""The training loop: one clock, one state, the same under `python`, `torchrun` and Ray Train.

Step k consumes the global batch of stream positions [k*B, (k+1)*B); rank r of W takes the r-th slice of it. What a
position holds and every random number it meets depend on (seed, position) alone, so W is no part of the result.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training import checkpoint, distributed, optim
from training.checkpoint import TrainState
from training.ema import Ema
from training.randomness import Draws
from training.systems.system import Batch, Trainable, TrainConfig

log = logging.getLogger("darkroom.train")

LOG_EVERY = 20
"""Steps between looks at the loss; a look is the only time that a step waits for its device."""


@dataclass(frozen=True)
class Report:
    """How far training is."""

    step: int
    max_steps: int
    loss: float
    samples_per_second: float


Batches = Callable[[int], Iterator[Batch]]
"""first step -> this rank's batches from that step on, on the training device."""


def train(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    folder: Path,
    *,
    identity: str,
    report: Callable[[Report], None] = lambda _: None,
) -> TrainState:
    """Trains to `config.max_steps`, resuming from the newest valid checkpoint under `folder`; returns the final state.

    Collective: every rank calls it. `identity` names (model, data, config); a checkpoint of another one is refused.
    Raises FloatingPointError when the loss is not finite, naming the steps.
    """
    state = build_state(trainable, config)
    if checkpoint.restore(folder, state, identity):
        log.info("resuming at step %d", state.clock)
    window = Window(config, state)
    for batch in batches(state.clock):
        if state.clock >= config.max_steps:
            break
        loss, grad_norm = step(trainable, state, batch, config)
        state.clock += 1
        if window.is_due(state.clock, loss, grad_norm):
            row = window.close(state.clock)
            state.curve = [*(state.curve or []), row]
            report(Report(state.clock, config.max_steps, row["loss"], row["samples_per_second"]))
        if state.clock % config.checkpoint_every == 0 or state.clock == config.max_steps:
            state.pending = window.look(state.clock)
            checkpoint.save(folder, state, identity)
    return state


def build_state(trainable: Trainable, config: TrainConfig) -> TrainState:
    """Fresh weights, the same on every rank for the same seed, with their optimizer and moving average."""
    torch.manual_seed(config.seed)
    model = trainable.build().to(distributed.device())
    model.train()
    model = distributed.distribute(model, fsdp=config.fsdp)
    ema = Ema(distributed.unwrap(model), config.ema_decay)  # names without DDP's prefix, whatever the world
    return TrainState(model, optim.build_optimizer(model, config), ema)


def step(
    trainable: Trainable, state: TrainState, batch: Batch, config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step; returns (loss, gradient norm) as scalars still on the device."""
    optim.set_learning_rate(state.optimizer, optim.learning_rate(state.clock, config))
    draws = Draws(config.seed, batch["position"])
    bf16 = config.precision == "bf16"
    with torch.autocast(batch["position"].device.type, torch.bfloat16, enabled=bf16):
        loss = trainable.loss(state.model, batch, draws).mean()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.clock)
    return loss.detach(), distributed.whole(grad_norm)


class Window:
    """The losses since the curve's last row, kept on the device until someone looks; `state` brings those before a resume."""

    def __init__(self, config: TrainConfig, state: TrainState) -> None:
        self.config = config
        self.losses = [torch.tensor(loss, device=distributed.device()) for loss in state.pending]
        self.grad_norm = torch.zeros(())
        self.opened = (state.clock, time.monotonic())

    def is_due(self, clock: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Takes one step's scalars; whether it is time to look at them."""
        self.losses.append(loss)
        self.grad_norm = grad_norm
        return clock % LOG_EVERY == 0 or clock == self.config.max_steps

    def look(self, clock: int) -> list[float]:
        """The loss of each step of the window, mean over ranks. Collective.

        Raises FloatingPointError naming the steps when a loss, or the newest gradient, is not finite.
        """
        if not self.losses:
            return []
        losses = distributed.mean_over_ranks(torch.stack(self.losses)).tolist()
        norm, first = float(self.grad_norm), clock - len(losses) + 1
        if bad := [(first + i, loss) for i, loss in enumerate(losses) if not math.isfinite(loss)]:
            problem = f"the loss is {bad[0][1]} at step {bad[0][0]}"
        elif not math.isfinite(norm):
            problem = f"the gradient's norm is {norm} at step {clock}"
        else:
            return losses
        raise FloatingPointError(
            f"{problem}, seen between steps {first} and {clock}: lower the learning rate or clip_grad_norm"
        )

    def close(self, clock: int) -> dict[str, float]:
        """The window's row of the training curve, mean over ranks; opens the next window. Raises as `look` does."""
        loss = statistics.fmean(self.look(clock))
        first, since = self.opened
        seconds = max(time.monotonic() - since, 1e-9)
        self.losses, self.opened = [], (clock, time.monotonic())
        return {
            "step": clock,
            "samples": clock * self.config.batch_size,
            "loss": loss,
            "grad_norm": float(self.grad_norm),
            "learning_rate": optim.learning_rate(clock - 1, self.config),
            "samples_per_second": (clock - first) * self.config.batch_size / seconds,
        }


def publish(trainable: Trainable, state: TrainState, folder: Path) -> dict[str, Any]:
    """Writes the averaged weights with their configs into `folder` (rank 0); returns the trainable's facts. Collective."""
    with state.ema.swapped_in():
        weights = checkpoint.whole_weights(state.model)
    if distributed.rank() != 0:
        return {}
    model = trainable.build()
    model.load_state_dict(weights)
    return trainable.publish(model.eval(), folder)
