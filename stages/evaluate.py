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
from data.checksums import checksum_of
from data.config import Config
from data.errors import StageFailed, UserError
from data.loader import ColumnSet
from data.manifest import ShardRecord, Snapshot, file_record, keys_digest
from data.sources import Prompt
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from stages.prompts import FILE, read_prompts
from training.distributed import device
from training.encoders import ClipEncoder, VaeEncoder
from training.metrics import comparison, inception, scores
from training.metrics.clip_score import clip_score
from training.metrics.moments import Moments, moments_of
from training.metrics.prompt_accuracy import prompt_accuracy
from training.metrics.protocol import Protocol
from training.metrics.references import read_reference
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip

BLOCK = 50
SCORES = "scores.json"


class EvaluateConfig(Config):
    """What is measured."""

    inception: str | None = Field(
        None, description="path of FID's Inception weights (pt_inception-2015-12-05); None: no FID"
    )
    reference: str | None = Field(
        None,
        description="path of an npz with mu and sigma of real images' Inception features, for FID; None: the training images",
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
    try:
        measured = _measure(config, inputs, workspace.folder, by_kind)
    except ValueError as error:  # a metric refuses what it was given, such as features that hold NaN
        raise StageFailed(f"no scores: {error}") from error
    storage.write_bytes(storage.join(workspace.folder, SCORES), json.dumps(measured, indent=1).encode())
    facts = {"scores": {s["name"]: s["value"] for s in measured["scores"]}}
    files = (file_record(workspace.folder, SCORES),)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files, facts=facts)


def reference_statistics(path: str) -> Moments:
    """Moments of real images' Inception features from a file that `training.metrics.references` reads; a file that does not
    tell how many images it is of counts as one more than their width.

    Raises UserError when the file is missing, holds no such statistics, or was made by an extractor of another width.
    """
    gaussian = read_reference(path, "inception").gaussian
    if gaussian is None:
        raise UserError(f"evaluate.reference={path} holds pictures: give statistics of Inception features")
    if len(gaussian.mean) != inception.WIDTH:
        raise UserError(
            f"evaluate.reference={path} has features of width {len(gaussian.mean)}, and Inception's are {inception.WIDTH}: it "
            "is of another extractor"
        )
    n = gaussian.n or inception.WIDTH + 1
    return Moments(n=n, mean=gaussian.mean, m2=gaussian.covariance * (n - 1))


def _tasks(config: EvaluateConfig, inputs: Inputs, parents: dict[str, str]) -> list[ShardTask]:
    payloads: list[tuple[dict[str, Any], int]] = [
        ({"kind": "fake", "block": shard.index}, shard.samples) for shard in inputs["generate"].shards
    ]
    total, chosen = _count(inputs), _real_rows(config, inputs)
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK].tolist()
        payloads.append(({"kind": "real", "rows": rows}, len(rows)))
    if config.inception and not config.reference:
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
    real = data.rows("img_emb", range(len(data)))
    found = [
        *scores.accuracy_scores(images, truths, [prompt.heldout for prompt in prompts]),
        *scores.embedding_scores(real, fake["img_emb"], fake["text_emb"]),
        scores.reconstruction_score(
            data.rows("image", rows), _stored(folder, "reconstructed", measured["real"])
        ),
        cosines["prior_cosine"],
    ]
    correct = _correct(images, prompts)
    deletions = {
        "fd_clip": comparison.frechet_deletions(moments_of(real), fake["img_emb"]),
        "cmmd": comparison.cmmd_deletions(real, fake["img_emb"]),
        "clip_score": comparison.mean_deletions(clip_score(fake["img_emb"], fake["text_emb"]).per_sample),
        **_accuracy_deletions(correct, prompts),
    }
    if config.inception:
        reference = (
            reference_statistics(config.reference)
            if config.reference
            else moments_of(_stored(folder, "inception", measured["reference"]))
        )
        generated = _stored(folder, "inception", measured["fake"])
        found.append(scores.fid_score(reference, generated))
        deletions["fid"] = comparison.frechet_deletions(
            reference, generated, max_blocks=scores.JACKKNIFE_BLOCKS
        )
    rows_of = [
        comparison.Measured(
            **score.model_dump(),
            protocol=_protocol(score, config, inputs),
            deletions=deletions.get(score.name),
        )
        for score in found
    ]
    return {
        "scores": [row.model_dump(mode="json") for row in rows_of],
        "prior": [score.model_dump() for score in cosines.values()],
        "attributes": _attributes(images, prompts),
        "correct": correct,
    }


def _accuracy_deletions(
    correct: Sequence[bool | None], prompts: Sequence[Prompt]
) -> dict[str, comparison.Deletions]:
    found = {}
    for name, wanted in (("prompt_accuracy", False), ("prompt_accuracy_heldout", True)):
        pairs = zip(correct, prompts, strict=True)
        right = [float(c) for c, prompt in pairs if c is not None and prompt.heldout is wanted]
        if len(right) > 1:
            found[name] = comparison.mean_deletions(np.array(right))
    return found


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


def _protocol(score: scores.Score, config: EvaluateConfig, inputs: Inputs) -> Protocol:
    """What the value of `score` depends on, read from the snapshots that it was computed from."""
    looked, against = {}, {"reference": inputs["data"].digest, "reference_n": _count(inputs)}
    if score.name in ("fd_clip", "cmmd", "clip_score", "prior_cosine"):
        looked = {
            "extractor": "clip",
            "extractor_digest": inputs["clip"].digest,
            "resize": "the encoder's own",
        }
    elif score.name == "fid":
        assert config.inception is not None
        looked = {
            "extractor": "inception",
            "extractor_digest": checksum_of(config.inception).sha256,
            "resize": "tf1",
        }
        if config.reference:
            against = {
                "reference": checksum_of(config.reference).sha256,
                "reference_n": reference_statistics(config.reference).n,
            }
    elif score.name.startswith("prompt_accuracy"):
        looked = {"extractor": "recogniser"}
    if score.name == "vae_psnr":
        made: dict[str, Any] = {"weights": {"vae": inputs["vae"].digest}}
    elif score.name == "prior_cosine":
        made = {"weights": {"prior": inputs["prior"].digest}, "sampling": _sampling(inputs, "prior_")}
    else:
        made = _drawn(inputs)
        against = against if score.name in ("fd_clip", "cmmd", "fid") else {}
    return Protocol(metric=score.name, n=score.n, **looked, **against, **made)


def _drawn(inputs: Inputs) -> dict[str, Any]:
    """How the generated pictures came about."""
    drawn = inputs["generate"].config
    prompts = next(f.sha256 for f in inputs["generate"].files if f.path == FILE)
    return {
        "prompts": prompts,
        "images_per_prompt": drawn.get("images_per_prompt", 1),
        "seeds": (drawn["seed"],),
        "sampler": drawn.get("sampler", "dpm_solver"),
        "num_inference_steps": drawn["num_inference_steps"],
        "guidance_scale": drawn["guidance_scale"],
        "sampling": _sampling(inputs, ""),
        "weights": {role: inputs[role].digest for role in ("clip", "vae", "prior", "denoiser")},
        "ema": bool(inputs["denoiser"].config.get("ema_decay")),
    }


def _sampling(inputs: Inputs, prefix: str) -> dict[str, Any]:
    """The sampler's settings that have no field of their own in a protocol."""
    named = {*Protocol.model_fields}
    return {
        name: inputs["generate"].config.get(name, field.default)
        for name, field in Sampling.model_fields.items()
        if name.startswith(prefix) and name not in named
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
    version=2,
    reads=lambda _: frozenset({"image", "caption", "img_emb", "text_emb", "generated"}),
    writes=lambda _: frozenset(),
    config=EvaluateConfig,
    run=run,
)
