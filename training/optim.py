"""AdamW with correct weight-decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.systems.system import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, vectors (norms, biases, scales) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (0.9, config.adam_beta2)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then cosine to 0 or constant."""
    warmup = min(config.warmup_steps, config.max_steps)
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
