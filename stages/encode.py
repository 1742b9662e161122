"""Shards -> VAE posteriors (mean and log-variance), row-aligned with each shard."""

from __future__ import annotations

import time

import numpy as np
import torch
from pydantic import Field

from data import columns, storage
from data.config import Config
from data.images import decode
from data.manifest import ShardRecord, Snapshot
from data.tars import ShardReader
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from training.distributed import device
from training.encoders import VaeEncoder


class EncodeConfig(Config):
    """How latents are computed; the VAE itself is an input."""

    batch_size: int = Field(64, ge=1, description="images per forward pass")


def run(config: EncodeConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Encodes every non-empty shard of `data` with the VAE of `vae` and commits."""
    started = time.monotonic()
    tasks = [
        ShardTask(shard.index, shard, {"data": shard.digest, "vae": inputs["vae"].digest}, shard.samples)
        for shard in inputs["data"].shards
        if shard.samples
    ]
    arguments = {"vae": inputs["vae"].folder, "data": inputs["data"].folder, "config": config}
    records = map_shards(Encoding, arguments, tasks, workspace)
    facts = {"scaling_factor": VaeEncoder.load(inputs["vae"].folder).scaling_factor}
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, facts=facts)


class Encoding:
    """The per-shard function, with the VAE loaded once."""

    def __init__(self, vae: str, data: str, config: EncodeConfig) -> None:
        self.vae = VaeEncoder.load(vae, device())
        self.data, self.config = data, config

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        shard: ShardRecord = task.payload
        with ShardReader(storage.join(self.data, f"{shard.index:05d}.tar")) as reader:
            moments = np.concatenate(
                [
                    self._encode(reader, range(start, min(start + self.config.batch_size, len(reader))))
                    for start in range(0, len(reader), self.config.batch_size)
                ]
            )
        file = columns.write_array(folder, "vae_moments", shard.index, moments)
        return ShardRecord(
            index=shard.index,
            samples=shard.samples,
            keys=shard.keys,
            files=(file,),
            parents=dict(task.parents),
        )

    def _encode(self, reader: ShardReader, rows: range) -> np.ndarray:
        images = np.stack([decode(reader.image(row)) for row in rows])  # (B, H, W, 3)
        return self.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).cpu().numpy()


STAGE = Stage(
    name="encode",
    version=1,
    reads=lambda _: frozenset({"image"}),
    writes=lambda _: frozenset({"vae_moments"}),
    config=EncodeConfig,
    run=run,
)
