"""Collectives: the identity for one process, and means and whole tensors for several.

Run as a program, this file is one worker of a world of two.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from training import distributed

CHECKOUT = Path(__file__).parents[2]


def test_a_single_process_is_rank_zero_of_a_world_of_one() -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()


def test_alone_every_collective_is_the_identity() -> None:
    value, model = torch.tensor([1.0, 2.0]), nn.Linear(2, 2)
    assert torch.equal(distributed.mean_over_ranks(value), value)
    assert torch.equal(distributed.whole(value), value)
    assert distributed.distribute(model, fsdp=False) is distributed.distribute(model, fsdp=True) is model
    assert distributed.unwrap(model) is model
    assert not distributed.whole(model.weight).requires_grad


def test_alone_no_process_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in (None, "1"):
        if world_size:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        with distributed.process_group():
            assert not dist.is_initialized()


def test_the_device_is_this_workers_own() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert distributed.device().type == expected


@pytest.mark.slow
def test_two_workers_agree_on_means_weights_and_shards() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = os.environ | world | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, __file__], env={**environment, "RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()


def _work() -> None:
    """One worker: every assertion holds on both ranks."""
    with distributed.process_group():
        assert distributed.world_size() == 2 and distributed.rank() == int(os.environ["RANK"])
        with distributed.process_group():
            assert dist.is_initialized(), "a group that is there is used and left alone"
        value = torch.tensor([1.0, 5.0]) * (1 + 2 * distributed.rank())
        assert distributed.mean_over_ranks(value).tolist() == [2.0, 10.0]
        assert value.tolist() == ([1.0, 5.0] if distributed.rank() == 0 else [3.0, 15.0])
        torch.manual_seed(0)
        model = nn.Sequential(nn.ModuleList([nn.Linear(3, 3)]), nn.Linear(3, 5))
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        replicated = distributed.distribute(model, fsdp=False)
        assert replicated is not model and distributed.unwrap(replicated) is model
        sharded = distributed.distribute(model, fsdp=True)
        assert distributed.unwrap(sharded) is sharded
        parts = {name: p.to_local().shape[0] for name, p in sharded.named_parameters()}
        assert parts["1.weight"] in (3, 2) and parts["0.0.bias"] in (2, 1), "each worker holds a part"
        for name, parameter in sharded.named_parameters():
            assert torch.equal(distributed.whole(parameter), weights[name])
    assert not dist.is_initialized()


if __name__ == "__main__":
    _work()
