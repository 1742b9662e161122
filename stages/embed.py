"""Shards -> CLIP image embeddings, text embeddings and text hidden states, row-aligned with each shard.

Legend: B samples of a batch, D embedding width, T tokens of one caption.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from pydantic import Field

from data import columns, storage
from data.config import Config
from data.images import decode
from data.manifest import ShardRecord, Snapshot, file_record
from data.tars import ShardReader
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from training.distributed import device
from training.encoders import ClipEncoder

COLUMNS = frozenset({"img_emb", "text_emb", "text_hidden"})
EMPTY = ("empty/text_emb.npy", "empty/text_hidden.npy")
"""What the empty caption has in the text columns: the unconditional input of guidance."""


class EmbedConfig(Config):
    """How embeddings are computed; the encoder itself is an input."""

    batch_size: int = Field(128, ge=1, description="samples per forward pass")


def run(config: EmbedConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Embeds every non-empty shard of `data` with the CLIP of `clip` and commits."""
    started = time.monotonic()
    shards = [shard for shard in inputs["data"].shards if shard.samples]
    tasks = [
        ShardTask(
            shard.index,
            {"shard": shard, "first": shard is shards[0]},
            {"data": shard.digest, "clip": inputs["clip"].digest},
            shard.samples,
        )
        for shard in shards
    ]
    arguments = {"clip": inputs["clip"].folder, "data": inputs["data"].folder, "config": config}
    records = map_shards(Embedding, arguments, tasks, workspace)
    files = tuple(file_record(workspace.folder, path) for path in EMPTY)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files)


class Embedding:
    """The per-shard function, with CLIP loaded once."""

    def __init__(self, clip: str, data: str, config: EmbedConfig) -> None:
        self.clip = ClipEncoder.load(clip, device())
        self.data, self.config = data, config

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        shard: ShardRecord = task.payload["shard"]
        with ShardReader(storage.join(self.data, f"{shard.index:05d}.tar")) as reader:
            parts = list(self._embed(reader))
            captions = [reader.caption(row) for row in range(len(reader))]
            files = (
                columns.write_array(folder, "img_emb", shard.index, np.concatenate([p[0] for p in parts])),
                columns.write_array(folder, "text_emb", shard.index, np.concatenate([p[1] for p in parts])),
                *columns.write_ragged(folder, "text_hidden", shard.index, [h for p in parts for h in p[2]]),
                columns.write_metadata(folder, shard.index, reader.keys, captions),
            )
        if task.payload["first"]:
            self._write_empty(folder)
        return ShardRecord(
            index=shard.index, samples=shard.samples, keys=shard.keys, files=files, parents=dict(task.parents)
        )

    def _embed(self, reader: ShardReader) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
        for start in range(0, len(reader), self.config.batch_size):
            rows = range(start, min(start + self.config.batch_size, len(reader)))
            images = self._images([decode(reader.image(row)) for row in rows])
            text_emb, hidden = self.clip.text([reader.caption(row) for row in rows])
            yield images.cpu().numpy(), text_emb.cpu().numpy(), [_numpy(h) for h in hidden]

    def _images(self, images: list[np.ndarray]) -> torch.Tensor:
        """(B, D) of pictures (H, W, 3); those of one size in one pass."""
        if len({image.shape for image in images}) == 1:
            return self.clip.image(_pixels(np.stack(images)))
        return torch.cat([self.clip.image(_pixels(image[None])) for image in images])

    def _write_empty(self, folder: str) -> None:
        text_emb, hidden = self.clip.text([""])
        for path, values in zip(EMPTY, (_numpy(text_emb[0]), _numpy(hidden[0])), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, values.astype("<f4"), allow_pickle=False)
            storage.write_bytes(storage.join(folder, path), buffer.getvalue())


def _pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _columns(_: Any) -> frozenset[str]:
    return COLUMNS


STAGE = Stage(
    name="embed",
    version=1,
    reads=lambda _: frozenset({"image", "caption"}),
    writes=_columns,
    config=EmbedConfig,
    run=run,
)
