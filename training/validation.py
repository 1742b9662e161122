"""The held-out loss of the averaged weights, at fixed timesteps with fixed noise: the same question every time.

The mean over 8 equidistant timesteps is MLPerf's measure for Flux (t in 0, 1/8 … 7/8 of the path), which follows the
quality of pictures (Esser et al. 2024, arXiv 2403.03206, section 5.3). Each sample is asked at one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from training import distributed, execution
from training.checkpoint import TrainState
from training.diffusion.objective import NUM_TRAIN_TIMESTEPS
from training.randomness import Draws
from training.systems.system import Batch, DiffusionTrainable, Trainable, TrainConfig

NUM_TIMESTEPS = 8
SEED = -1
"""Of the noise; no training has it, and every training is asked with the same."""

HeldOut = Callable[[], Iterable[Batch]]
"""This rank's held-out batches, the same at every call, as many and as large on every rank; `position` numbers them.

Where they have a `weight`, samples of weight 0 make the shares equal and are asked for nothing.
"""


@torch.no_grad()
def validation_loss(trainable: Trainable, state: TrainState, config: TrainConfig, held_out: HeldOut) -> float:
    """The mean over timesteps of the mean loss there; without timesteps the mean loss. Collective.

    Leaves weights, generators and the training stream as they are.
    """
    timed = isinstance(trainable, DiffusionTrainable)
    sums = torch.zeros(2, NUM_TIMESTEPS, dtype=torch.float64, device=distributed.device())
    state.model.eval()
    with state.ema.swapped_in(), execution.eagerly(config):
        for batch in held_out():
            at = batch["position"] % NUM_TIMESTEPS if timed else torch.zeros_like(batch["position"])
            losses = _losses(trainable, state, config, batch, at).double()
            counts = batch.get("weight", torch.ones_like(losses)).double()
            sums[0].index_add_(0, at, torch.where(counts > 0, losses, 0.0))
            sums[1].index_add_(0, at, counts)
    state.model.train()
    totals, counts = distributed.mean_over_ranks(sums)
    return float((totals / counts)[counts > 0].mean())


def fixed_timesteps(at: torch.Tensor) -> torch.Tensor:
    """0, 125 … 875 for 0, 1 … 7: float32."""
    return at.float() * (NUM_TRAIN_TIMESTEPS / NUM_TIMESTEPS)


def is_due(previous: int, clock: int, config: TrainConfig) -> bool:
    """Whether a multiple of `validate_every`, or the end, lies in the steps after `previous` up to `clock`."""
    every = config.validate_every
    return every is not None and (previous // every < clock // every or clock == config.max_steps)


def _losses(
    trainable: Trainable, state: TrainState, config: TrainConfig, batch: Batch, at: torch.Tensor
) -> torch.Tensor:
    draws, bf16 = Draws(SEED, batch["position"]), config.precision == "bf16"
    with torch.autocast(at.device.type, torch.bfloat16, enabled=bf16):
        if isinstance(trainable, DiffusionTrainable):
            return trainable.loss(state.model, batch, draws, fixed_timesteps(at))
        return trainable.loss(state.model, batch, draws)
