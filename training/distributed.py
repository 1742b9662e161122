"""Rank, world size and collectives; everything degrades to a single process without torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.execution import blocks

PATIENCE = timedelta(minutes=30)
"""How long a worker waits for the others: one of them may be writing what it publishes."""


def rank() -> int:
    """This process's index among the training workers, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many training workers there are, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Returns once every worker has called it."""
    if dist.is_initialized():
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """Every worker's `value`, by rank, on every worker: small plain objects only."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of `value` over all workers, on every worker."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, detached, on every worker. Collective for a sharded one."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full else tensor).detach()


def device() -> torch.device:
    """This worker's own device: its CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def wait_for_device() -> None:
    """Returns once this worker's device has done all that it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of those whom RANK, WORLD_SIZE and MASTER_ADDR name, as `torchrun` sets them; none when alone.

    One that is there already is used as it is.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device().type == "cuda":
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after a failure: the others may be waiting in a collective, and it for them


def distribute(model: nn.Module, *, fsdp: bool) -> nn.Module:
    """`model` ready for this world: as it is, replicated by DDP, or sharded in place by FSDP2."""
    if world_size() == 1:
        return model
    if fsdp:
        return _fully_shard(model)
    ids = [device().index] if device().type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def unwrap(model: nn.Module) -> nn.Module:
    """The module under DDP; FSDP2 shards in place and adds no wrapper."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Backward passes inside the block sum gradients over the workers, or keep them for a later one that does."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)  # type: ignore[operator]
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def _fully_shard(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device().type, (world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)
