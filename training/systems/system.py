"""What the loop and the stages know of a model: `Trainable`, `Columns`, `Batch`. Concrete systems are siblings of this file.

Legend: B batch, H W pixels, D embedding width, T longest caption of the dataset in tokens, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from data.config import Config, operational
from training.randomness import Draws

Batch: TypeAlias = dict[str, Any]
"""What the loader yields, by column name, on the training device:

    image        (B, 3, H, W) uint8, 0 to 255
    caption      list of B str
    img_emb      (B, D) float32, L2-normalised
    text_emb     (B, D) float32, L2-normalised
    text_hidden  (B, T, D) float32, zero after the caption's end; with it text_length (B,) int64, tokens before padding
    vae_moments  (B, 2C, h, w) float32, mean then log-variance, unscaled
    position     (B,) int64, always there: the samples' global positions in the training stream
    weight       (B,) float32, of held-out batches: 1, or 0 for what only makes the ranks' shares equal
"""


class TrainConfig(Config):
    """Options that every training stage has; each trainable's config extends it with its own."""

    max_steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="samples per optimizer step, over all workers")
    learning_rate: float = Field(1e-3, gt=0, le=1, description="peak learning rate of AdamW")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up to the peak")
    schedule: str = Field(
        "cosine", pattern="^(cosine|constant)$", description="after warm-up: cosine to 0, or constant"
    )
    weight_decay: float = Field(
        0.01, ge=0, description="decoupled weight decay of matrices; norms and biases have none"
    )
    adam_beta2: float = Field(
        0.999,
        gt=0,
        lt=1,
        description="decay of AdamW's second moment; short runs learn faster with less, such as 0.95",
    )
    clip_grad_norm: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay per step of the weights' moving average; 0 disables"
    )
    precision: str = Field(
        "fp32", pattern="^(fp32|bf16)$", description="autocast dtype; weights and optimizer stay fp32"
    )
    seed: int = Field(0, ge=0, description="seeds initial weights, sample order and every draw")
    num_workers: int | None = operational(
        None,
        ge=1,
        description="training workers, one device each; None: one GPU, or two of the CPUs where there is no GPU",
    )
    fsdp: bool = operational(
        False, description="shard weights over the workers (FSDP2) instead of replicating them"
    )
    checkpoint_every: int = operational(200, ge=1, description="steps between checkpoints")
    validate_every: int | None = Field(
        None,
        ge=1,
        description="steps between looks at the held-out loss of the averaged weights; None: never",
    )
    validation_samples: int = Field(
        256, ge=0, description="samples kept out of training for it, at most a tenth of the dataset"
    )
    accumulate: int = operational(
        1, ge=1, description="parts that a worker splits its batch into, one after the other, to save memory"
    )
    activation_checkpointing: bool = operational(
        False, description="compute activations again in the backward pass instead of keeping them"
    )
    compile: bool | None = operational(
        None, description="compile the network with torch.compile; None: where there is a CUDA device"
    )
    on_spike: str = Field(
        "skip",
        pattern="^(fail|skip|rollback)$",
        description="what a step does whose gradient is no number or above spike_factor: end the training, change nothing, "
        "or change nothing and after max_skips of them return to the last checkpoint and go on with later samples",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="a gradient norm of so many times the usual one is a spike; None: only what is not finite",
    )
    max_skips: int = Field(10, ge=0, description="most steps of 1,000 that may be skipped")
    log_to: str = operational(
        "",
        pattern="^((wandb|mlflow)(,(wandb|mlflow))?)?$",
        description="services that get the metrics besides Parquet and TensorBoard: wandb, mlflow, or both with a comma",
    )

    def held_out(self, count: int) -> int:
        """How many of `count` samples are kept for validation: none without it, and never more than a tenth."""
        return min(self.validation_samples, count // 10) if self.validate_every else 0


class Columns(Protocol):
    """Random access to a dataset's row-aligned columns; `data.loader.ColumnSet` is the real one."""

    def __len__(self) -> int: ...

    def shape(self, column: str) -> tuple[int, ...]:
        """Per-sample shape: (D,), (T, D) with T the longest caption, (2C, h, w), (H, W, 3)."""
        ...

    def rows(self, column: str, indices: Sequence[int]) -> np.ndarray:
        """Stacked rows as the batch holds them, float32 or uint8."""
        ...

    def empty(self, column: str) -> np.ndarray:
        """The row of `text_emb` (D,) or `text_hidden` (T0, D) that the empty caption has, float32."""
        ...

    def facts(self, column: str) -> Mapping[str, Any]:
        """Facts of the artifact that wrote the column, such as the VAE's `scaling_factor`."""
        ...

    def maker(self, column: str) -> str | None:
        """Where the network that computed the column lay: a folder or a hub name; None where that is not known."""
        ...


class Trainable(Protocol):
    """A model and its loss: all that the loop knows."""

    columns: tuple[str, ...]
    """Batch fields it consumes; the loader reads no others."""

    def build(self) -> nn.Module:
        """A freshly initialised module; deterministic under `torch.manual_seed`, and valid on the meta device."""
        ...

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Per-sample loss (B,) float32. Calls `model` through `forward` only, since it may be wrapped by DDP or FSDP."""
        ...

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Writes weights and configs so that their own library loads `folder`; returns the facts readers need."""
        ...


@runtime_checkable
class DiffusionTrainable(Trainable, Protocol):
    """A trainable whose loss has a timestep, which may also be given."""

    def timesteps(self, draws: Draws) -> Tensor:
        """The timesteps (B,) float32 in [0, 1000) that training draws for these samples."""
        ...

    def loss(self, model: nn.Module, batch: Batch, draws: Draws, t: Tensor | None = None) -> Tensor:
        """As of any trainable; with `t` (B,) at these timesteps instead of drawn ones."""
        ...
