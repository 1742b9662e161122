"""Generated images -> scores: features by fan-out, then every metric from the stored features, each with its interval.

Legend: B images of a block, D embedding width, H W pixels, N images in all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import Field

from data import columns, storage
from data.config import Config
from data.loader import ColumnSet
from data.manifest import ShardRecord, Snapshot, file_record, keys_digest
from data.sources import Prompt
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from stages.prompts import read_prompts
from training.distributed import device
from training.encoders import ClipEncoder, VaeEncoder
from training.metrics import inception, scores
from training.metrics.prompt_accuracy import prompt_accuracy
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip

BLOCK = 50
SCORES = "scores.json"


class EvaluateConfig(Config):
    """What is measured."""

    inception: str | None = Field(
        None, description="path of FID's Inception weights (pt_inception-2015-12-05); None: no FID"
    )
    reconstruction_images: int = Field(
        256, ge=2, description="real images for the VAE's PSNR and the prior's diagnostics"
    )


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Extracts features, computes every metric that the inputs allow, and commits `scores.json`."""
    started = time.monotonic()
    parents = {role: snapshot.digest for role, snapshot in inputs.items()}
    tasks = _tasks(config, inputs, parents)
    arguments = {"inputs": [(r, s.model_dump(), s.folder) for r, s in inputs.items()], "config": config}
    records = map_shards(Measuring, arguments, tasks, workspace)
    by_kind: dict[str, list[ShardRecord]] = {}
    for task, record in zip(tasks, records, strict=True):
        by_kind.setdefault(task.payload["kind"], []).append(record)
    measured = _measure(config, inputs, workspace.folder, by_kind)
    storage.write_bytes(storage.join(workspace.folder, SCORES), json.dumps(measured, indent=1).encode())
    facts = {"scores": {s["name"]: s["value"] for s in measured["scores"]}}
    files = (file_record(workspace.folder, SCORES),)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files, facts=facts)


def _tasks(config: EvaluateConfig, inputs: Inputs, parents: dict[str, str]) -> list[ShardTask]:
    payloads: list[tuple[dict[str, Any], int]] = [
        ({"kind": "fake", "block": shard.index}, shard.samples) for shard in inputs["generate"].shards
    ]
    total, chosen = _count(inputs), _real_rows(config, inputs)
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK].tolist()
        payloads.append(({"kind": "real", "rows": rows}, len(rows)))
    if config.inception:
        for start in range(0, total, BLOCK):
            rows = list(range(start, min(start + BLOCK, total)))
            payloads.append(({"kind": "reference", "rows": rows}, len(rows)))
    return [ShardTask(index, payload, parents, weight) for index, (payload, weight) in enumerate(payloads)]


class Measuring:
    """The per-block function: features of generated images, reconstructions and predictions for real ones."""

    def __init__(self, inputs: Sequence[tuple[str, dict, str]], config: EvaluateConfig) -> None:
        self.inputs = {r: Snapshot.model_validate(s).model_copy(update={"folder": f}) for r, s, f in inputs}
        folder = {role: snapshot.folder for role, snapshot in self.inputs.items()}
        self.clip = ClipEncoder.load(folder["clip"], device())
        self.vae = VaeEncoder.load(folder["vae"], device())
        self.system = Unclip.load(
            folder["clip"], folder["vae"], folder["prior"], folder["denoiser"], device()
        )
        self.inception = inception.load_inception(config.inception).to(device()) if config.inception else None
        self.data = ColumnSet([self.inputs["data"], self.inputs["embed"]])
        self.prompts = read_prompts(folder["generate"])
        self.sampling = Sampling.model_validate(
            {k: v for k, v in self.inputs["generate"].config.items() if k in Sampling.model_fields}
        )

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        measure = {"fake": self._fake, "real": self._real, "reference": self._reference}[task.payload["kind"]]
        keys, arrays = measure(task.payload)
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

    def _fake(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        images = columns.open_array(self.inputs["generate"].folder, "generated", payload["block"])
        shards = self.inputs["generate"].shards
        start = sum(shard.samples for shard in shards if shard.index < payload["block"])
        texts = [p.text for p in self.prompts[start : start + len(images)]]
        pixels = _pixels(images)
        arrays = {"img_emb": _numpy(self.clip.image(pixels)), "text_emb": _numpy(self.clip.text(texts)[0])}
        if self.inception is not None:
            arrays["inception"] = _numpy(inception.features(self.inception, pixels))
        return [f"{start + i:09d}" for i in range(len(images))], arrays

    def _real(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        rows = payload["rows"]
        moments = self.vae.encode(_pixels(self.data.rows("image", rows)))
        mean = moments.chunk(2, dim=1)[0]  # (B, C, h, w)
        decoded = self.vae.decode(mean).permute(0, 2, 3, 1).cpu().numpy()
        draws = Draws(0, torch.tensor(rows, device=device()))
        predicted = self.system.predict_image_embedding(self.data.captions(rows), draws, self.sampling)
        predicted = torch.nn.functional.normalize(predicted, dim=-1)
        arrays = {"reconstructed": np.ascontiguousarray(decoded), "predicted_emb": _numpy(predicted)}
        return self.data.keys(rows), arrays

    def _reference(self, payload: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
        assert self.inception is not None
        rows = payload["rows"]
        features = inception.features(self.inception, _pixels(self.data.rows("image", rows)))
        return self.data.keys(rows), {"inception": _numpy(features)}


def _measure(
    config: EvaluateConfig, inputs: Inputs, folder: str, measured: Mapping[str, Sequence[ShardRecord]]
) -> dict[str, Any]:
    """Every metric, from stored features: what `scores.json` holds."""
    data = ColumnSet([inputs["data"], inputs["embed"]])
    prompts = read_prompts(inputs["generate"].folder)
    images = _stored(inputs["generate"].folder, "generated", inputs["generate"].shards)
    fake = {name: _stored(folder, name, measured["fake"]) for name in ("img_emb", "text_emb")}
    rows = _real_rows(config, inputs)
    truths = [prompt.truth for prompt in prompts]
    cosines = scores.prior_cosines(
        _stored(folder, "predicted_emb", measured["real"]),
        data.rows("img_emb", rows),
        data.rows("text_emb", rows),
    )
    found = [
        *scores.accuracy_scores(images, truths, [prompt.heldout for prompt in prompts]),
        *scores.embedding_scores(data.rows("img_emb", range(len(data))), fake["img_emb"], fake["text_emb"]),
        scores.reconstruction_score(
            data.rows("image", rows), _stored(folder, "reconstructed", measured["real"])
        ),
        cosines["prior_cosine"],
    ]
    if config.inception:
        real, generated = (_stored(folder, "inception", measured[kind]) for kind in ("reference", "fake"))
        found.append(scores.fid_score(real, generated))
    return {
        "scores": [score.model_dump() for score in found],
        "prior": [score.model_dump() for score in cosines.values()],
        "attributes": _attributes(images, prompts),
        "correct": _correct(images, prompts),
        "protocol": _protocol(config, inputs),
    }


def _attributes(images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, dict[str, float]]:
    """attribute -> {"seen": share, "held out": share}; empty where no prompt has a truth."""
    table: dict[str, dict[str, float]] = {}
    for label, wanted in (("seen", False), ("held out", True)):
        rows = [i for i, p in enumerate(prompts) if p.truth is not None and p.heldout is wanted]
        if rows:
            found = prompt_accuracy(images[rows], [prompts[i].truth or {} for i in rows])
            for attribute, share in found.by_attribute.items():
                table.setdefault(attribute, {})[label] = share
    return table


def _correct(images: np.ndarray, prompts: Sequence[Prompt]) -> list[bool | None]:
    """Per image: every attribute right, or None where the prompt has no truth."""
    rows = [i for i, p in enumerate(prompts) if p.truth is not None]
    verdicts: list[bool | None] = [None] * len(prompts)
    if rows:
        correct = prompt_accuracy(images[rows], [prompts[i].truth or {} for i in rows]).correct
        for row, right in zip(rows, correct.tolist(), strict=True):
            verdicts[row] = right
    return verdicts


def _protocol(config: EvaluateConfig, inputs: Inputs) -> dict[str, Any]:
    """What the numbers depend on besides the images; two runs compare only where these agree."""
    return {
        "extractor": inputs["clip"].digest,
        "reference": inputs["data"].digest,
        "reference_samples": _count(inputs),
        "generate": inputs["generate"].config,
        "prompts": next(f.sha256 for f in inputs["generate"].files if f.path.endswith("prompts.jsonl")),
        "weights": {role: inputs[role].digest for role in ("vae", "prior", "denoiser")} | {"averaged": True},
        "evaluate": config.model_dump(),
    }


def _real_rows(config: EvaluateConfig, inputs: Inputs) -> np.ndarray:
    total = _count(inputs)
    return np.linspace(0, total - 1, min(total, config.reconstruction_images)).round().astype(int)


def _count(inputs: Inputs) -> int:
    """Samples that count: all, less those that `embed.min_clip_score` leaves out."""
    return len(ColumnSet([inputs["data"], inputs["embed"]]))


def _stored(folder: str, name: str, records: Sequence[ShardRecord]) -> np.ndarray:
    return np.concatenate([columns.open_array(folder, name, record.index) for record in records])


def _pixels(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 array -> (B, 3, H, W) tensor."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous()


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


STAGE = Stage(
    name="evaluate",
    version=1,
    reads=lambda _: frozenset({"image", "caption", "img_emb", "text_emb", "generated"}),
    writes=lambda _: frozenset(),
    config=EvaluateConfig,
    run=run,
)
