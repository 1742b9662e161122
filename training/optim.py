"""AdamW with correct weight-decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.systems.system import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW; `decays` says which weights decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for name, p in trained if decays(name, p) and id(p) not in embeddings]
    decayed = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": [p for _, p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
    betas = (0.9, config.adam_beta2)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix or a kernel of a layer: not a bias, a norm, a scale, nor a table of positions or tokens.

    Such tables are bare parameters that transformers of open_clip and diffusers name `…_embedding`.
    """
    return parameter.ndim >= 2 and not name.rpartition(".")[2].endswith("embedding")


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
