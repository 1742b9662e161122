"""Shards -> VAE posteriors (mean and log-variance), row-aligned with each shard.

Legend: n samples of a shard, B of a batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
import torch
from pydantic import Field

from data import columns, storage
from data.config import Config, operational
from data.errors import UserError
from data.manifest import ShardRecord, Snapshot
from data.tars import ShardReader
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, Writing, map_shards, per_shard
from stages.overlap import Batch, decoded, fetched
from training.distributed import device
from training.encoders import Precision, VaeEncoder


class EncodeConfig(Config):
    """How latents are computed; the VAE itself is an input."""

    batch_size: int = Field(64, ge=1, description="images per forward pass")
    precision: Precision = Field("fp32", description="of weights and activations; bf16 and fp16 are for GPUs")
    decode_threads: int | None = operational(
        None, ge=1, description="threads per actor that decode pictures; None: its share of the CPUs"
    )


def run(config: EncodeConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Encodes every non-empty shard of `data` with the VAE of `vae` and commits."""
    started = time.monotonic()
    tasks = per_shard(inputs, "vae")
    arguments = {"vae": inputs["vae"].folder, "data": inputs["data"].folder, "config": config}
    records = map_shards(Encoding, arguments, tasks, workspace)
    facts = {"scaling_factor": VaeEncoder.load(inputs["vae"].folder).scaling_factor}
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, facts=facts)


class Encoding:
    """The per-shard function, with the VAE loaded once."""

    def __init__(self, vae: str, data: str, config: EncodeConfig) -> None:
        self.device = device()
        self.vae = VaeEncoder.load(vae, self.device, config.precision)
        self.data, self.config = data, config

    def __call__(self, task: ShardTask, folder: str) -> Writing:
        shard: ShardRecord = task.payload
        with ShardReader(storage.join(self.data, f"{shard.index:05d}.tar")) as reader:
            moments = self.encode(reader)

        def write() -> ShardRecord:
            return ShardRecord(
                index=shard.index,
                samples=shard.samples,
                keys=shard.keys,
                files=(columns.write_array(folder, "vae_moments", shard.index, moments),),
                parents=dict(task.parents),
            )

        return write

    def encode(self, reader: ShardReader) -> np.ndarray:
        """Moments (n, 2C, h, w) float16 of a shard's pictures.

        Raises UserError when the pictures are not all of one size: the rows of a column have one shape in a shard.
        """
        moments: np.ndarray | None = None
        filled = 0
        with closing(
            decoded(reader, self.config.batch_size, self.device, self.config.decode_threads)
        ) as batches:
            one_size = _of_one_size(batches, reader.keys)
            for (part,) in fetched((self.vae.encode(pixels).half(),) for pixels in one_size):
                if moments is None:
                    moments = np.empty((len(reader), *part.shape[1:]), part.dtype)
                moments[filled : filled + len(part)] = part
                filled += len(part)
        assert moments is not None, f"{reader.url} is empty"
        return moments


def _of_one_size(batches: Iterable[Batch], keys: Sequence[str]) -> Iterator[torch.Tensor]:
    """The pixels (B, 3, H, W) of each batch, all of the size of the shard's first picture."""
    first: tuple[int, int] | None = None
    for batch in batches:
        for row, size in zip(batch.rows, batch.sizes, strict=True):
            first = first or size
            if size != first:
                raise UserError(
                    f"picture {keys[row]} is {size[1]} x {size[0]} and the first of its shard {first[1]} x {first[0]}; "
                    "latents need pictures of one size: shard with shard.resize center_crop or border"
                )
        assert isinstance(batch.pixels, torch.Tensor)
        yield batch.pixels


STAGE = Stage(
    name="encode",
    version=2,
    reads=lambda _: frozenset({"image"}),
    writes=lambda _: frozenset({"vae_moments"}),
    config=EncodeConfig,
    run=run,
    grows=True,
)
