"""Shards -> CLIP image embeddings, text embeddings and text hidden states, row-aligned with each shard.

Legend: B samples of a batch, D embedding width, T tokens of one caption.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from pydantic import Field

from data import columns, storage
from data.config import Config, operational
from data.manifest import Ledger, ShardRecord, Snapshot, file_record
from data.tars import ShardReader
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, Writing, map_shards, per_shard
from stages.overlap import Batch, decoded, fetched
from training.distributed import device
from training.encoders import ClipEncoder, Precision

COLUMNS = frozenset({"img_emb", "text_emb", "text_hidden"})
EMPTY = ("empty/text_emb.npy", "empty/text_hidden.npy")
"""What the empty caption has in the text columns: the unconditional input of guidance."""


class EmbedConfig(Config):
    """How embeddings are computed; the encoder itself is an input."""

    batch_size: int = Field(128, ge=1, description="samples per forward pass")
    precision: Precision = Field("fp32", description="of weights and activations; bf16 and fp16 are for GPUs")
    min_clip_score: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="cosine of image and caption below which a pair is left out of what follows, counted; None: all stay",
    )
    decode_threads: int | None = operational(
        None, ge=1, description="threads per actor that decode pictures; None: its share of the CPUs"
    )


def run(config: EmbedConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Embeds every non-empty shard of `data` with the CLIP of `clip` and commits."""
    started = time.monotonic()
    tasks = per_shard(inputs, "clip")
    folders = {"clip": inputs["clip"].folder, "data": inputs["data"].folder}
    arguments = {**folders, "config": config, "first": tasks[0].index if tasks else None}
    records = map_shards(Embedding, arguments, tasks, workspace)
    files = tuple(file_record(workspace.folder, path) for path in EMPTY)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files)


class Embedding:
    """The per-shard function, with CLIP loaded once. Shard `first` brings the empty caption along."""

    def __init__(self, clip: str, data: str, config: EmbedConfig, first: int | None) -> None:
        self.device = device()
        self.clip = ClipEncoder.load(clip, self.device, config.precision)
        self.data, self.config, self.first = data, config, first

    def __call__(self, task: ShardTask, folder: str) -> Writing:
        shard: ShardRecord = task.payload
        with ShardReader(storage.join(self.data, f"{shard.index:05d}.tar")) as reader:
            captions = [reader.caption(row) for row in range(len(reader))]
            img_emb, text_emb, hidden = self.embed(reader, captions)
            keys = reader.keys
        if shard.index == self.first:
            self._write_empty(folder)

        def write() -> ShardRecord:
            kept, ledger = self._kept(img_emb, text_emb)
            files = (
                *([] if kept is None else [columns.write_array(folder, "kept", shard.index, kept)]),
                columns.write_array(folder, "img_emb", shard.index, img_emb),
                columns.write_array(folder, "text_emb", shard.index, text_emb),
                *columns.write_ragged(folder, "text_hidden", shard.index, hidden),
                columns.write_metadata(folder, shard.index, keys, captions),
            )
            return ShardRecord(
                index=shard.index,
                samples=shard.samples,
                keys=shard.keys,
                files=files,
                ledger=ledger,
                parents=dict(task.parents),
            )

        return write

    def _kept(self, img_emb: np.ndarray, text_emb: np.ndarray) -> tuple[np.ndarray | None, Ledger]:
        """(n,) bool, which pairs reach the least CLIP score, and their count; None where there is no such rule."""
        if self.config.min_clip_score is None:
            return None, Ledger()
        kept = (img_emb.astype(np.float32) * text_emb).sum(axis=1) >= self.config.min_clip_score
        dropped = len(kept) - int(kept.sum())
        filtered = {"low_clip_score": dropped} if dropped else {}
        return kept, Ledger(written=len(kept) - dropped, filtered=filtered)

    def embed(
        self, reader: ShardReader, captions: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Image and text embeddings (n, D) float16 of a shard's samples, and per sample its hidden states (T, W) float16."""
        images, texts, hidden = [], [], []
        with closing(
            decoded(reader, self.config.batch_size, self.device, self.config.decode_threads)
        ) as batches:
            for image, text, states, lengths in fetched(self._launched(b, captions) for b in batches):
                images.append(image)
                texts.append(text)
                hidden += np.split(states, np.cumsum(lengths)[:-1])
        return np.concatenate(images), np.concatenate(texts), hidden

    def _launched(self, batch: Batch, captions: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Embeddings (B, D) twice and states (sum of T, W), float16 and perhaps still in the making; each T (B,) int64."""
        image = self.clip.image(batch.pixels)
        text, states, lengths = self.clip.ragged_text([captions[row] for row in batch.rows])
        return image.half(), text.half(), states.half(), torch.tensor(lengths)

    def _write_empty(self, folder: str) -> None:
        text_emb, hidden = self.clip.text([""])
        for path, values in zip(EMPTY, (_numpy(text_emb[0]), _numpy(hidden[0])), strict=True):
            buffer = io.BytesIO()
            np.save(buffer, values.astype("<f4"), allow_pickle=False)
            storage.write_bytes(storage.join(folder, path), buffer.getvalue())


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _columns(config: Any) -> frozenset[str]:
    return COLUMNS if config.min_clip_score is None else COLUMNS | {"kept"}


STAGE = Stage(
    name="embed",
    version=1,
    reads=lambda _: frozenset({"image", "caption"}),
    writes=_columns,
    config=EmbedConfig,
    run=run,
    grows=True,
)
