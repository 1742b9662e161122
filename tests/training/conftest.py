"""Fixtures of the model tests: a small dataset in memory with every column that a trainable reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.systems import clip, denoiser, prior, vae
from training.systems.clip import ClipConfig
from training.systems.denoiser import DenoiserConfig
from training.systems.prior import PriorConfig
from training.systems.system import Batch
from training.systems.unclip import Unclip
from training.systems.vae import VaeConfig


class MemoryColumns:
    """`Columns` over arrays: 12 pictures of 16 px, captions of 2 to 6 tokens, embeddings of 8, latents of 2 x 4 x 4."""

    def __init__(self, count: int = 12, width: int = 8) -> None:
        rng = np.random.default_rng(0)
        unit = rng.normal(size=(2, count, 8)) + 0.5
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        self.lengths = rng.integers(2, 7, count)
        self.lengths[0] = 6
        hidden = rng.normal(size=(count, 6, width)) * (np.arange(6) < self.lengths[:, None])[..., None]
        self.arrays: dict[str, np.ndarray] = {
            "image": rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8),
            "img_emb": unit[0].astype(np.float32),
            "text_emb": unit[1].astype(np.float32),
            "text_hidden": hidden.astype(np.float32),
            "vae_moments": rng.normal(size=(count, 4, 4, 4)).astype(np.float32),
        }
        self.captions = [f"picture number {i}" for i in range(count)]
        self.makers: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.captions)

    def shape(self, column: str) -> tuple[int, ...]:
        return self.arrays[column].shape[1:]

    def rows(self, column: str, indices: Sequence[int]) -> np.ndarray:
        return self.arrays[column][np.asarray(indices)]

    def empty(self, column: str) -> np.ndarray:
        width = self.arrays[column].shape[-1]
        return np.full((2, width) if column == "text_hidden" else width, width**-0.5, np.float32)

    def facts(self, column: str) -> Mapping[str, Any]:
        return {"scaling_factor": 0.5} if column == "vae_moments" else {}

    def maker(self, column: str) -> str | None:
        return self.makers.get(column)

    def batch(self, names: Sequence[str], indices: Sequence[int]) -> Batch:
        """What the loader yields; position i is sample i."""
        fields: Batch = {
            name: torch.from_numpy(self.rows(name, indices)) for name in names if name != "caption"
        }
        if "caption" in names:
            fields["caption"] = [self.captions[i] for i in indices]
        if "image" in names:
            fields["image"] = fields["image"].permute(0, 3, 1, 2)
        if "text_hidden" in names:
            fields["text_length"] = torch.from_numpy(self.lengths[np.asarray(indices)])
        return {**fields, "position": torch.tensor(list(indices))}


@pytest.fixture
def columns() -> MemoryColumns:
    """A fresh small dataset."""
    return MemoryColumns()


@pytest.fixture
def narrow_text_columns() -> MemoryColumns:
    """The same, with text states narrower than the embeddings."""
    return MemoryColumns(width=6)


PARTS = {
    "clip": (clip, ClipConfig(embed_dim=8, image_size=16, vision_width=16, vision_layers=1, vision_heads=2,
                              vision_patch_size=8, text_width=8, text_layers=1, text_heads=2, context_length=12)),
    "vae": (vae, VaeConfig(block_out_channels=(8, 8, 8), norm_num_groups=4, latent_channels=2)),
    "prior": (prior, PriorConfig(num_layers=1, num_attention_heads=2, attention_head_dim=8)),
    "denoiser": (denoiser, DenoiserConfig(block_out_channels=(8, 8), num_attention_heads=2, norm_num_groups=4)),
}  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The four published parts, untrained. Shared by every test: copy one before changing it."""
    place = tmp_path_factory.mktemp("parts")
    for name, (system, config) in PARTS.items():
        torch.manual_seed(0)
        trainable = system.fit(config, MemoryColumns())
        trainable.publish(trainable.build().eval(), place / name)
    return {name: place / name for name in PARTS}


@pytest.fixture
def system(folders) -> Unclip:
    return Unclip.load(str(folders["clip"]), str(folders["vae"]), folders["prior"], folders["denoiser"])
