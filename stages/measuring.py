"""What an evaluation looks at, block by block: features of generated and of real pictures, reconstructions, predictions.

Legend: B pictures of a block, D feature width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data import columns
from data.loader import ColumnSet
from data.manifest import ShardRecord, Snapshot, keys_digest
from stages.fanout import ShardTask
from stages.prompts import read_prompts
from training.distributed import device
from training.encoders import ClipEncoder, VaeEncoder
from training.metrics import extractors
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip

GENERATED, PARTS, REFERENCE = "generated", "parts", "reference"
"""Kinds of task: pictures that the system drew; real ones that its VAE and its prior are held against; real ones that the
generated are compared with."""
ORIGINAL, RECONSTRUCTED = "original_inception", "reconstructed_inception"
"""Columns of Inception's features of the pictures of `PARTS`."""
CLIP_TEXT = "clip_text"
"""Column of the captions of the generated pictures as a CLIP other than the run's own reads them."""

Weights = Mapping[str, tuple[str, bool]]
"""Extractor -> (path of its weights, whether they are other than the published ones)."""


class Measuring:
    """The per-block function, with every network loaded once."""

    def __init__(self, inputs: Sequence[tuple[str, dict, str]], weights: Weights) -> None:
        self.inputs = {r: Snapshot.model_validate(s).model_copy(update={"folder": f}) for r, s, f in inputs}
        folder = {role: snapshot.folder for role, snapshot in self.inputs.items()}
        self.clip = ClipEncoder.load(folder["clip"], device())
        self.vae = VaeEncoder.load(folder["vae"], device())
        self.system = Unclip.load(
            folder["clip"], folder["vae"], folder["prior"], folder["denoiser"], device()
        )
        self.extractors = {
            name: extractors.load(name, path, is_custom=custom) for name, (path, custom) in weights.items()
        }
        self.data = ColumnSet([self.inputs["data"], self.inputs["embed"]])
        self.prompts = read_prompts(folder["generate"])
        self.sampling = Sampling.model_validate(
            {k: v for k, v in self.inputs["generate"].config.items() if k in Sampling.model_fields}
        )

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        measure = {GENERATED: self._generated, PARTS: self._parts, REFERENCE: self._reference}
        keys, arrays = measure[task.payload["kind"]](task.payload)
        files = tuple(
            columns.write_array(folder, name, task.index, values) for name, values in arrays.items()
        )
        return ShardRecord(
            index=task.index,
            samples=len(keys),
            keys=keys_digest(keys),
            files=files,
            parents=dict(task.parents),
        )

    def _generated(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        images = columns.open_array(self.inputs["generate"].folder, "generated", payload["block"])
        shards = self.inputs["generate"].shards
        start = sum(shard.samples for shard in shards if shard.index < payload["block"])
        texts = [p.text for p in self.prompts[start : start + len(images)]]
        arrays = self._features(images)
        if "clip" in self.extractors:
            arrays[CLIP_TEXT] = self._read(texts)
        else:
            arrays["img_emb"] = _numpy(extractors.clip_images(self.clip, extractors.pictures(list(images))))
            arrays["text_emb"] = extractors.clip_texts(self.clip, texts)
        return [f"{start + i:09d}" for i in range(len(images))], arrays

    def _parts(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        rows = payload["rows"]
        images = self.data.rows("image", rows)
        mean = self.vae.encode(_pixels(images)).chunk(2, dim=1)[0]  # (B, C, h, w)
        decoded = np.ascontiguousarray(self.vae.decode(mean).permute(0, 2, 3, 1).cpu().numpy())
        draws = Draws(0, torch.tensor(rows, device=device()))
        predicted = self.system.predict_image_embedding(self.data.captions(rows), draws, self.sampling)
        predicted = torch.nn.functional.normalize(predicted, dim=-1)
        arrays = {"reconstructed": decoded, "predicted_emb": _numpy(predicted)}
        if "inception" in self.extractors:
            arrays[ORIGINAL] = self._features(images, "inception")["inception"]
            arrays[RECONSTRUCTED] = self._features(decoded, "inception")["inception"]
        return self.data.keys(rows), arrays

    def _read(self, captions: list[str]) -> np.ndarray:
        read = self.extractors["clip"].text
        assert read is not None, "a CLIP reads"
        return read(captions)

    def _reference(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        rows, names = payload["rows"], payload["extractors"]
        return self.data.keys(rows), self._features(self.data.rows("image", rows), *names)

    def _features(self, images: np.ndarray, *names: str) -> dict[str, np.ndarray]:
        """Extractor -> features (B, D) of pictures (B, H, W, 3) uint8, in the extractor's own micro-batches."""
        pictures = extractors.pictures(list(images))
        return {name: _numpy(self.extractors[name].features(pictures)) for name in names or self.extractors}


def _pixels(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) tensor."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
