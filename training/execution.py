"""How a network is run: memory format, recomputation in the backward pass, compilation. None of it changes what it computes.

All of it happens in place, before the network is distributed, and leaves the names of its state dict as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from training.systems.system import TrainConfig

BLOCK_LIMIT = 64
"""Graphs that dynamo may keep per function: blocks of one class share it."""


def prepared(
    model: nn.Module, config: TrainConfig, *, world_size: int, backend: str = "inductor"
) -> nn.Module:
    """`model` itself, to be run as `config` says. Alone it is one graph; of several workers each block is one.

    A worker's blocks are compiled one by one so that their gradients travel while the backward pass goes on.
    """
    if not (world_size > 1 and config.fsdp):  # FSDP2 shards contiguous weights only
        convolutions_channels_last(model)
    if config.activation_checkpointing:
        for block in blocks(model):
            block.forward = _recomputed(block.forward)
    if compiles(config):
        torch._dynamo.config.recompile_limit = max(BLOCK_LIMIT, torch._dynamo.config.recompile_limit)
        for part in [model] if world_size == 1 else blocks(model):
            part.compile(backend=backend, fullgraph=True, dynamic=False)
    return model


def compiles(config: TrainConfig) -> bool:
    """What `compile` says, or whether there is a CUDA device."""
    return torch.cuda.is_available() if config.compile is None else config.compile


def convolutions_channels_last(model: nn.Module) -> None:
    """Lays the weights of a convolutional network out channels last, which its activations then follow."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != m.stride]
    if convolutions:  # a transformer's patch embedding, whose windows do not overlap, gains nothing
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: a transformer's layers, a U-Net's resolutions."""
    found, inside = [], ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, nn.ModuleList):
            found += [
                member for member in module if member is not None
            ]  # diffusers keeps places of absent layers
            inside = (*inside, f"{name}.")
    return found


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        # our networks draw nothing, and to keep the generators' states would wait for the device
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@contextmanager
def eagerly(config: TrainConfig) -> Iterator[None]:
    """Runs networks without their graphs inside the block: batches of other shapes then compile nothing."""
    if not compiles(config):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
