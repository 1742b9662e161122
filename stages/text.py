"""Shards -> T5 hidden states of the captions, row-aligned with each shard; no picture is opened.

Legend: T tokens of one caption, W text width.
"""

from __future__ import annotations

import io
import time

import numpy as np
from pydantic import Field

from data import columns, storage
from data.config import Config
from data.manifest import ShardRecord, Snapshot, file_record
from data.tars import ShardReader
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, Writing, map_shards, per_shard
from training.distributed import device
from training.encoders import Precision, T5Encoder

EMPTY = "empty/t5_hidden.npy"
"""The states (1, W) of the empty caption, which is its end token alone: the unconditional input of guidance."""


class TextConfig(Config):
    """How T5 reads captions; the encoder itself is an input."""

    batch_size: int = Field(64, ge=1, description="captions per forward pass")
    precision: Precision = Field("fp32", description="of weights and activations; bf16 and fp16 are for GPUs")
    max_length: int = Field(
        256, ge=2, description="most tokens of a caption, the end token included; the rest is cut off"
    )


def run(config: TextConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Reads the captions of every non-empty shard of `data` with the T5 of `t5` and commits."""
    started = time.monotonic()
    tasks = per_shard(inputs, "t5")
    folders = {"t5": inputs["t5"].folder, "data": inputs["data"].folder}
    arguments = {**folders, "config": config, "first": tasks[0].index if tasks else None}
    records = map_shards(Reading, arguments, tasks, workspace)
    files = (file_record(workspace.folder, EMPTY),)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files)


class Reading:
    """The per-shard function, with T5 loaded once. Shard `first` brings the empty caption along."""

    def __init__(self, t5: str, data: str, config: TextConfig, first: int | None) -> None:
        self.t5 = T5Encoder.load(t5, device(), config.precision, config.max_length)
        self.data, self.config, self.first = data, config, first

    def __call__(self, task: ShardTask, folder: str) -> Writing:
        shard: ShardRecord = task.payload
        with ShardReader(storage.join(self.data, f"{shard.index:05d}.tar")) as reader:
            captions, keys = [reader.caption(row) for row in range(len(reader))], reader.keys
        hidden = self._states(captions)
        if shard.index == self.first:
            buffer = io.BytesIO()
            np.save(buffer, self._states([""])[0].astype("<f4"), allow_pickle=False)
            storage.write_bytes(storage.join(folder, EMPTY), buffer.getvalue())

        def write() -> ShardRecord:
            files = (
                *columns.write_ragged(folder, "t5_hidden", shard.index, hidden),
                columns.write_metadata(folder, shard.index, keys, captions),
            )
            return ShardRecord(
                index=shard.index,
                samples=shard.samples,
                keys=shard.keys,
                files=files,
                parents=dict(task.parents),
            )

        return write

    def _states(self, captions: list[str]) -> list[np.ndarray]:
        """Per caption its states (T, W) float16."""
        return [states.half().numpy() for states in self.t5.text(captions, self.config.batch_size)]


STAGE = Stage(
    name="text",
    version=1,
    reads=lambda _: frozenset({"caption"}),
    writes=lambda _: frozenset({"t5_hidden"}),
    config=TextConfig,
    run=run,
    grows=True,
)
