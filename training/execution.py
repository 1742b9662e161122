"""How a network is run: memory format, recomputation in the backward pass, compilation. None of it changes what it computes.

All of it happens in place, before the network is distributed, and leaves the names of its state dict as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
    convolutions_channels_last(model, with_weights=not (world_size > 1 and config.fsdp))
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


def convolutions_channels_last(model: nn.Module, *, with_weights: bool) -> None:
    """Makes a convolutional network compute channels last: by the layout of its weights, or of its convolutions' inputs.

    One of the two is enough for a convolution to choose that layout, and its result has it. FSDP2 shards contiguous weights
    only; each call then turns them, which is little beside the activations of a batch.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != m.stride]
    if not convolutions:  # a transformer's patch embedding, whose windows do not overlap, gains nothing
        return
    if with_weights:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return
    for convolution in convolutions:
        convolution.register_forward_pre_hook(_channels_last)


def _channels_last(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)


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
