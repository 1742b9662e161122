"""The number of workers is no part of a training: 1, 2 and 3 of them consume the same samples, draws and losses.

Run as a program, this file is one training worker: `test_world_size.py FOLDER DATASET_JSON ACCUMULATE`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data import columns
from data.ahead import prefetch
from data.loader import ColumnSet, batches
from data.manifest import ShardRecord, Snapshot
from training import distributed, loop
from training.randomness import Draws
from training.systems import prior
from training.systems.prior import PriorConfig
from training.systems.system import Batch

CHECKOUT = Path(__file__).parents[2]
CONFIG = PriorConfig(
    max_steps=6,
    batch_size=12,
    warmup_steps=2,
    seed=9,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=8,
)
COUNTS = (7, 20, 16)
"""Samples of each shard: an epoch ends inside a batch."""


def _dataset(folder: str) -> Snapshot:
    rng, records = np.random.default_rng(1), []
    for shard, count in enumerate(COUNTS):
        unit = rng.normal(size=(2, count, 8))
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        hidden = [rng.normal(size=(rng.integers(2, 6), 8)).astype(np.float32) for _ in range(count)]
        files = (
            columns.write_array(folder, "img_emb", shard, unit[0].astype(np.float32)),
            columns.write_array(folder, "text_emb", shard, unit[1].astype(np.float32)),
            *columns.write_ragged(folder, "text_hidden", shard, hidden),
        )
        records.append(ShardRecord(index=shard, samples=count, keys=str(shard), files=files))
    for column, shape in (("text_emb", (8,)), ("text_hidden", (2, 8))):
        columns.publish(folder, f"empty/{column}.npy", columns._npy(np.full(shape, 0.3, np.float16)))
    names = ("img_emb", "text_emb", "text_hidden")
    return Snapshot(
        stage="embed",
        version=1,
        fingerprint="e",
        config={},
        columns=names,
        shards=tuple(records),
        folder=folder,
    )


class Recorded:
    """The prior, which notes for every sample: its position, what it holds, what was drawn for it, and its loss."""

    def __init__(self, inner: prior.Prior) -> None:
        self.inner, self.columns = inner, inner.columns
        self.steps: list[dict[str, list[Any]]] = []

    def build(self) -> nn.Module:
        return self.inner.build()

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        return self.inner.publish(model, folder)

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        before = torch.get_rng_state()
        loss = self.inner.loss(model, batch, draws)
        assert torch.equal(before, torch.get_rng_state()), "a draw that is no function of the position"
        step = {
            "position": batch["position"],
            "img_emb": batch["img_emb"],
            "text_hidden": batch["text_hidden"].sum((1, 2)),
            "timestep": draws.uniform("prior.timestep"),
            "noise": draws.normal("prior.noise", (8,)),
            "drop": draws.uniform("prior.text_drop"),
            "loss": loss.detach(),
        }
        self.steps.append({name: value.tolist() for name, value in step.items()})
        return loss


def _train(folder: Path, data: Snapshot, accumulate: int = 1) -> list[dict[str, list[Any]]]:
    """What this rank recorded, by step."""
    config = CONFIG.model_copy(update={"accumulate": accumulate})
    dataset = ColumnSet([data])
    trainable = Recorded(prior.fit(CONFIG, dataset))

    def from_step(step: int) -> Any:
        return prefetch(
            batches(
                dataset,
                trainable.columns,
                seed=CONFIG.seed,
                batch_size=CONFIG.batch_size,
                first_step=step,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            )
        )

    loop.train(trainable, from_step, config, folder / "checkpoints", identity="one")
    steps = [trainable.steps[at : at + accumulate] for at in range(0, len(trainable.steps), accumulate)]
    return [_joined(parts) for parts in steps]


def _joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _launch(folder: Path, data: Snapshot, world_size: int, accumulate: int) -> list[dict[str, list[Any]]]:
    """Each step's samples over all ranks, in the order of ranks."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | world | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    spec = json.dumps([data.model_dump(mode="json"), data.folder])
    line = [sys.executable, __file__, str(folder), spec, str(accumulate)]
    workers = [subprocess.Popen(line, env={**environment, "RANK": str(rank)}) for rank in range(world_size)]
    try:
        assert [worker.wait(timeout=500) for worker in workers] == [0] * world_size
    finally:
        for worker in workers:
            worker.kill()
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    return [_joined(parts) for parts in zip(*ranks, strict=True)]


@pytest.mark.slow
def test_one_two_and_three_workers_consume_the_same_and_lose_the_same_whole_or_in_parts(
    tmp_path: Path,
) -> None:
    data = _dataset(str(tmp_path / "embed"))
    alone = _train(tmp_path / "1", data)
    positions = [position for step in alone for position in step["position"]]
    assert positions == list(range(CONFIG.max_steps * CONFIG.batch_size)) and len(positions) > sum(COUNTS)
    losses = [step.pop("loss") for step in alone]
    for world_size, accumulate in ((2, 1), (2, 3), (3, 1)):
        together = _launch(tmp_path / f"{world_size}x{accumulate}", data, world_size, accumulate)
        for found, step in zip(losses, together, strict=True):
            assert step.pop("loss") == pytest.approx(found, rel=1e-4)
        assert together == alone


def _work(folder: Path, spec: str, accumulate: int) -> None:
    snapshot, at = json.loads(spec)
    with distributed.process_group():
        steps = _train(
            folder, Snapshot.model_validate(snapshot).model_copy(update={"folder": at}), accumulate
        )
        (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(steps))
        distributed.barrier()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
