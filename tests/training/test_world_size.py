"""The number of workers is no part of a training: 1, 2 and 3 of them consume the same samples, draws and losses."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PriorTransformer, UNet2DConditionModel  # noqa: F401  before the ranks fork
from PIL import Image
from torch import Tensor, nn

from data import columns, sources
from data.ahead import prefetch
from data.loader import ColumnSet, batches
from data.manifest import ShardRecord, Snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from training import distributed, loop
from training.randomness import Draws
from training.systems import clip, denoiser, prior, vae
from training.systems.clip import ClipConfig
from training.systems.denoiser import DenoiserConfig
from training.systems.prior import PriorConfig
from training.systems.system import Batch, Trainable
from training.systems.vae import VaeConfig

sys.path.insert(0, str(Path(__file__).parent))
import worlds

pytestmark = pytest.mark.slow

COMMON: dict[str, Any] = {"max_steps": 6, "batch_size": 12, "warmup_steps": 2, "seed": 9}
PARTS: dict[str, tuple[Any, Any]] = {
    "clip": (clip, ClipConfig(embed_dim=8, image_size=16, vision_width=16, vision_layers=1, vision_heads=2, flip=True,
                              vision_patch_size=8, text_width=8, text_layers=1, text_heads=2, context_length=12, **COMMON)),
    "vae": (vae, VaeConfig(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, flip=True, **COMMON)),
    "prior": (prior, PriorConfig(num_layers=1, num_attention_heads=2, attention_head_dim=8, **COMMON)),
    "denoiser": (denoiser, DenoiserConfig(block_out_channels=(8, 8), num_attention_heads=2, norm_num_groups=4, **COMMON)),
}  # fmt: skip
WORLDS = {2: (1, 3), 3: (1,)}
"""Workers -> the parts of each one's batch."""
COUNTS = (7, 20, 16)
"""Samples of each shard: an epoch ends inside a batch."""

Step = dict[str, list[Any]]


def _pictures(folder: Path) -> Snapshot:
    """Noise with captions, as the shard stage writes it."""
    (folder / "source").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for i in range(sum(COUNTS)):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            folder / "source" / f"{i:02d}.png"
        )
        (folder / "source" / f"{i:02d}.txt").write_text(f"noise number {i}")
    rows = sources.list_rows(SourceConfig(path=str(folder / "source")))
    ends, config = np.cumsum(COUNTS), ShardConfig(image_size=16, encode_format="png")
    records = tuple(
        write_shard(rows[end - count : end], shard, str(folder), config)
        for shard, (end, count) in enumerate(zip(ends, COUNTS, strict=True))
    )
    return _snapshot(folder, "shard", ("caption", "image"), records)


def _arrays(folder: Path) -> Snapshot:
    """Random embeddings, text states and posteriors, as the embed and encode stages write them."""
    rng, records, at = np.random.default_rng(1), [], str(folder)
    for shard, count in enumerate(COUNTS):
        unit = rng.normal(size=(2, count, 8))
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        hidden = [rng.normal(size=(rng.integers(2, 6), 8)).astype(np.float32) for _ in range(count)]
        files = (
            columns.write_array(at, "img_emb", shard, unit[0].astype(np.float32)),
            columns.write_array(at, "text_emb", shard, unit[1].astype(np.float32)),
            columns.write_array(
                at, "vae_moments", shard, rng.normal(size=(count, 4, 4, 4)).astype(np.float32)
            ),
            *columns.write_ragged(at, "text_hidden", shard, hidden),
        )
        records.append(ShardRecord(index=shard, samples=count, keys=str(shard), files=files))
    for column, shape in (("text_emb", (8,)), ("text_hidden", (2, 8))):
        columns.publish(at, f"empty/{column}.npy", columns._npy(np.full(shape, 0.3, np.float16)))
    names = ("img_emb", "text_emb", "text_hidden", "vae_moments")
    return _snapshot(folder, "embed", names, tuple(records), scaling_factor=0.5)


def _snapshot(
    folder: Path, stage: str, names: tuple[str, ...], shards: tuple[ShardRecord, ...], **facts: Any
) -> Snapshot:
    made = Snapshot(
        stage=stage, version=1, fingerprint="e", config={}, columns=names, shards=shards, facts=facts
    )
    return made.model_copy(update={"folder": str(folder)})


class NotedDraws(Draws):
    """Draws, with the bits of every one that was made: purpose -> a number per sample."""

    def _bits(self, purpose: str, count: int) -> Tensor:
        bits = super()._bits(purpose, count)
        self.__dict__.setdefault("made", {})[purpose] = bits.sum(1).tolist()
        return bits


class Recorded:
    """A trainable, which notes for every sample: its position, what it holds, what was drawn for it, and its loss."""

    def __init__(self, inner: Trainable) -> None:
        self.inner, self.columns = inner, inner.columns
        self.steps: list[Step] = []

    def build(self) -> nn.Module:
        return self.inner.build()

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        return self.inner.publish(model, folder)

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        before, noted = torch.get_rng_state(), NotedDraws(draws.seed, draws.index)
        loss = self.inner.loss(model, batch, noted)
        assert torch.equal(before, torch.get_rng_state()), "a draw that is no function of the position"
        held = {name: _held(values) for name, values in batch.items()}
        self.steps.append({**held, **noted.__dict__["made"], "loss": loss.detach().tolist()})
        return loss


def _held(values: Tensor | list[str]) -> list[Any]:
    """A number for what each sample holds; positions and captions as they are."""
    if not isinstance(values, Tensor) or values.ndim == 1:
        return list(values) if isinstance(values, list) else values.tolist()
    return [zlib.crc32(row.contiguous().numpy().tobytes()) for row in values]


def _train(folder: Path, data: Snapshot, part: str, accumulate: int = 1) -> list[Step]:
    """What this rank recorded, by step."""
    system, config = PARTS[part]
    config, dataset = config.model_copy(update={"accumulate": accumulate}), ColumnSet([data])
    trainable = Recorded(system.fit(config, dataset))

    def from_step(step: int) -> Any:
        return prefetch(
            batches(
                dataset,
                trainable.columns,
                seed=config.seed,
                batch_size=config.batch_size,
                first_step=step,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            )
        )

    loop.train(trainable, from_step, config, folder / "checkpoints", identity="one")
    steps = [trainable.steps[at : at + accumulate] for at in range(0, len(trainable.steps), accumulate)]
    return [_joined(parts) for parts in steps]


def _joined(parts: Sequence[Step]) -> Step:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def train_all(folder: str, spec: dict[str, Any], counts: list[int]) -> None:
    """One rank of a world, which trains every part with its batch in so many parts; CLIP only with its batch whole."""
    for accumulate in counts:
        for part, (snapshot, at) in spec.items():
            if part != "clip" or accumulate == 1:
                data = Snapshot.model_validate(snapshot).model_copy(update={"folder": at})
                place = Path(folder) / f"{part}x{accumulate}"
                steps = _train(place, data, part, accumulate)
                (place / f"rank{distributed.rank()}.json").write_text(json.dumps(steps))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Snapshot]:
    pictures = _pictures(tmp_path_factory.mktemp("pictures"))
    arrays = _arrays(tmp_path_factory.mktemp("arrays"))
    return {"clip": pictures, "vae": pictures, "prior": arrays, "denoiser": arrays}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Snapshot]) -> Path:
    """Where every world's ranks left what they recorded."""
    folder = tmp_path_factory.mktemp("worlds")
    spec = {part: (snapshot.model_dump(mode="json"), snapshot.folder) for part, snapshot in data.items()}
    for world_size, counts in WORLDS.items():
        worlds.run(__file__, "train_all", world_size, str(folder / str(world_size)), spec, counts)
    return folder


@pytest.mark.parametrize("part", PARTS)
def test_one_two_and_three_workers_consume_the_same_and_lose_the_same_whole_or_in_parts(
    tmp_path: Path, data: dict[str, Snapshot], together: Path, part: str
) -> None:
    alone = _train(tmp_path, data[part], part)
    positions = [position for step in alone for position in step["position"]]
    assert positions == list(range(COMMON["max_steps"] * COMMON["batch_size"]))
    assert len(positions) > sum(COUNTS) and len(alone[0]) > 3, "draws and columns were noted"
    losses = [step.pop("loss") for step in alone]
    for world_size, counts in WORLDS.items():
        for accumulate in counts if part != "clip" else (1,):
            place = together / str(world_size) / f"{part}x{accumulate}"
            ranks = [json.loads((place / f"rank{rank}.json").read_text()) for rank in range(world_size)]
            steps = [_joined(parts) for parts in zip(*ranks, strict=True)]
            for found, step in zip(losses, steps, strict=True):
                assert step.pop("loss") == pytest.approx(found, rel=1e-4)
            assert steps == alone
