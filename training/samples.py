"""Pictures from the averaged weights, of the same held-out samples and the same noise every time: learning, looked at."""

from __future__ import annotations

import io
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import storage
from training import distributed, execution
from training.checkpoint import TrainState
from training.randomness import Draws
from training.systems.system import Batch, Trainable, TrainConfig
from training.validation import SEED, HeldOut

COUNT, COLUMNS, GAP = 8, 8, 2
SMALLEST_SIDE = 64
"""Pictures below this many pixels are enlarged by whole factors, so that eyes can judge them."""


@runtime_checkable
class Pictures(Protocol):
    """A trainable that can show what it has learned."""

    def sample(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Pictures (n, 3, H, W) uint8 for the samples of a batch, as many as it likes. Calls `model` through `forward` only."""
        ...


@torch.no_grad()
def write_samples(
    trainable: Trainable, state: TrainState, config: TrainConfig, held_out: HeldOut, folder: str
) -> None:
    """Writes `folder`/step_XXXXXXXX.png (rank 0) where the trainable is one of `Pictures`. Collective."""
    first = next(iter(held_out()), None)
    if first is None or not isinstance(trainable, Pictures):
        return
    batch = {name: values[:COUNT] for name, values in first.items()}
    state.model.eval()
    with state.ema.swapped_in(), execution.eagerly(config):
        pictures = trainable.sample(state.model, batch, Draws(SEED, batch["position"]))
    state.model.train()
    if distributed.rank() != 0:
        return
    factor = -(-SMALLEST_SIDE // pictures.shape[-1])
    pictures = pictures.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    buffer = io.BytesIO()
    Image.fromarray(grid(pictures).numpy()).save(buffer, "PNG")
    storage.write_bytes(storage.join(folder, f"step_{state.clock:08d}.png"), buffer.getvalue())


def grid(pictures: Tensor) -> Tensor:
    """`pictures` (n, 3, H, W) uint8 in rows of COLUMNS, GAP white pixels around each: (rows * (H + GAP) + GAP, ..., 3) uint8."""
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    apart = F.pad(pictures, (GAP, 0, GAP, 0), value=255)
    _, channels, height, width = apart.shape
    cells = apart.new_full((rows * columns, channels, height, width), 255)
    cells[: len(apart)] = apart
    cells = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return F.pad(
        cells.reshape(channels, rows * height, columns * width), (0, GAP, 0, GAP), value=255
    ).permute(1, 2, 0)
