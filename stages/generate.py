"""Prompts -> images by the trained system, fanned out in fixed blocks; and a gallery of what the system can do.

Image k of prompt p is a function of (weights, sampling, seed, p, k): each block is computed alone, whoever computes it.
Legend: B prompts of a block, D embedding width, H W pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from data import columns, storage
from data.config import operational
from data.loader import ColumnSet
from data.manifest import FileRecord, ShardRecord, Snapshot, file_record, keys_digest
from data.sources import Prompt
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from stages.pictures import png
from stages.prompts import FILE, evaluation_prompts, write_prompts
from training.distributed import device
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip, slerp

BLOCK = 50
"""Images per block: the unit of work and of resuming. Part of the result, since a batched sum rounds by its size."""
VARIED, VARIATIONS = 4, 4
STRIPS, FRAMES = 3, 7
GALLERY = "gallery/gallery.jsonl"


class GenerateConfig(Sampling):
    """What is generated for evaluation."""

    num_images: int = Field(500, ge=2, description="images to generate and score")
    images_per_prompt: int = Field(
        1, ge=1, description="images per prompt, side by side, each from noise of its own; divides num_images"
    )
    prompts: str | None = operational(
        None,
        description="a file of prompts (.txt, .jsonl, .tsv, .csv), at least num_images / images_per_prompt; None: the dataset's own",
    )
    prompts_digest: str = Field(
        "", description="SHA-256 of that file; filled in, or given to insist on one file"
    )
    seed: int = Field(
        0, ge=0, description="with the indices of prompt and image, the only source of randomness"
    )

    @model_validator(mode="after")
    def _whole_prompts(self) -> Self:
        if self.num_images % self.images_per_prompt:
            raise ValueError(
                f"num_images={self.num_images} is no multiple of images_per_prompt={self.images_per_prompt}: every prompt gets "
                "the same number of images"
            )
        return self

    @property
    def num_prompts(self) -> int:
        """Prompts that are drawn from."""
        return self.num_images // self.images_per_prompt


def run(config: GenerateConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Generates every block and the gallery, and commits."""
    started = time.monotonic()
    chosen = evaluation_prompts(inputs["data"], config.num_prompts, config.prompts)
    prompts = [prompt for prompt in chosen for _ in range(config.images_per_prompt)]
    write_prompts(workspace.folder, prompts)
    parents = {role: snapshot.digest for role, snapshot in inputs.items()}
    starts = range(0, len(prompts), BLOCK)
    tasks = [
        ShardTask(
            index, (start, prompts[start : start + BLOCK]), parents, len(prompts[start : start + BLOCK])
        )
        for index, start in enumerate(starts)
    ]
    tasks.append(ShardTask(len(tasks), None, parents, VARIED * VARIATIONS + STRIPS * FRAMES))
    arguments = {"folders": {role: s.folder for role, s in inputs.items()}, "config": config}
    arguments["columns"] = [(s.model_dump(), s.folder) for s in (inputs["data"], inputs["embed"])]
    *blocks, gallery = map_shards(Generating, arguments, tasks, workspace)
    files = (*gallery.files, file_record(workspace.folder, FILE))
    return commit(STAGE, config, inputs, workspace, started=started, shards=tuple(blocks), files=files)


class Generating:
    """The per-block function, with the whole system loaded once."""

    def __init__(
        self, folders: Mapping[str, str], config: GenerateConfig, columns: list[tuple[dict, str]]
    ) -> None:
        self.system = Unclip.load(
            folders["clip"], folders["vae"], folders["prior"], folders["denoiser"], device()
        )
        self.config, self.columns = config, columns

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        if task.payload is None:
            files, samples, keys = self._gallery(folder), 0, ""
        else:
            start, prompts = task.payload
            file = columns.write_array(folder, "generated", task.index, self._block(start, prompts))
            files, samples = (file,), len(prompts)
            keys = keys_digest(f"{start + i:09d}" for i in range(samples))
        return ShardRecord(
            index=task.index, samples=samples, keys=keys, files=files, parents=dict(task.parents)
        )

    def _block(self, start: int, prompts: list[Prompt]) -> np.ndarray:
        each = self.config.images_per_prompt
        draws = self._draws(noise_index(i, each) for i in range(start, start + len(prompts)))
        return _pictures(self.system.generate([p.text for p in prompts], draws, self.config))

    def _gallery(self, folder: str) -> tuple[FileRecord, ...]:
        data = ColumnSet(
            [Snapshot.model_validate(s).model_copy(update={"folder": f}) for s, f in self.columns]
        )
        chosen = np.linspace(0, len(data) - 1, max(VARIED, 2 * STRIPS) + 2).round().astype(int)[1:-1]
        items = [*self._variations(data, chosen[:VARIED]), *self._interpolations(data, chosen)]
        lines, files = [], []
        for item in items:
            path = f"gallery/{item['kind']}_{item['group']:02d}_{item['position']:02d}.png"
            storage.write_bytes(storage.join(folder, path), png(item.pop("image")))
            lines.append(json.dumps({**item, "file": PurePosixPath(path).name}) + "\n")
            files.append(file_record(folder, path))
        storage.write_bytes(storage.join(folder, GALLERY), "".join(lines).encode())
        return (*files, file_record(folder, GALLERY))

    def _variations(self, data: ColumnSet, chosen: np.ndarray) -> list[dict[str, Any]]:
        embeddings = torch.from_numpy(data.rows("img_emb", chosen)).to(device())  # (VARIED, D)
        repeated = embeddings.repeat_interleave(VARIATIONS, dim=0)
        pictures = _pictures(
            self.system.develop(repeated, None, self._draws(range(len(repeated))), self.config)
        )
        captions = data.captions(chosen)
        items = []
        for group, (caption, original) in enumerate(zip(captions, data.rows("image", chosen), strict=True)):
            row = [original, *pictures[group * VARIATIONS : (group + 1) * VARIATIONS]]
            items += [_item("variation", group, at, caption, image) for at, image in enumerate(row)]
        return items

    def _interpolations(self, data: ColumnSet, chosen: np.ndarray) -> list[dict[str, Any]]:
        embeddings = torch.from_numpy(data.rows("img_emb", chosen)).to(device())
        fractions = torch.linspace(0, 1, FRAMES, device=device())
        captions, items = data.captions(chosen), []
        for group in range(STRIPS):
            a, b = 2 * group, 2 * group + 1
            path = slerp(embeddings[a], embeddings[b], fractions)  # (FRAMES, D)
            same_noise = self._draws([group] * FRAMES)
            pictures = _pictures(self.system.develop(path, None, same_noise, self.config))
            label = f"{captions[a]} → {captions[b]}"
            items += [_item("interpolation", group, at, label, image) for at, image in enumerate(pictures)]
        return items

    def _draws(self, index: Iterable[int]) -> Draws:
        return Draws(self.config.seed, torch.tensor(list(index), dtype=torch.int64, device=device()))


def noise_index(image: int, images_per_prompt: int) -> int:
    """What the noise of image `image` depends on besides the seed: its prompt's index, and above bit 32 which of the
    prompt's images it is. An image's noise stays what it is when more images per prompt are asked for."""
    prompt, which = divmod(image, images_per_prompt)
    return which << 32 | prompt


def _pictures(images: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) uint8 tensor -> (B, H, W, 3) array."""
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def _item(kind: str, group: int, position: int, caption: str, image: np.ndarray) -> dict[str, Any]:
    return {"kind": kind, "group": group, "position": position, "caption": caption, "image": image}


STAGE = Stage(
    name="generate",
    version=1,
    reads=lambda _: frozenset({"image", "caption", "img_emb"}),
    writes=lambda _: frozenset({"generated"}),
    config=GenerateConfig,
    run=run,
)
