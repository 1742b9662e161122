"""Generated images -> scores: features by fan-out, then every metric from the stored features, each with its interval.

Legend: N generated images, M real ones that they are compared with, K real ones for the parts, D feature width.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from data import columns, storage
from data.checksums import checksum_of
from data.config import Config, listed
from data.errors import StageFailed
from data.loader import ColumnSet
from data.manifest import ShardRecord, Snapshot, file_record
from stages.accumulating import accumulate_on_cluster
from stages.borrowing import borrow
from stages.contract import Inputs, Stage, Workspace, commit
from stages.fanout import ShardTask, map_shards
from stages.measured_under import Against, Looked, clip_of, protocol_of
from stages.measuring import (
    CLIP_TEXT,
    GENERATED,
    ORIGINAL,
    PARTS,
    RECONSTRUCTED,
    REFERENCE,
    Measuring,
    Weights,
)
from stages.prompts import read_prompts
from training.metrics import comparison, extractors, scores
from training.metrics.catalogue import METRICS, Metric, Sample, few
from training.metrics.frechet import Gaussian
from training.metrics.intervals import Deletions
from training.metrics.references import inception_statistics
from training.systems.embeddings import spread_indices

log = logging.getLogger("darkroom.evaluate")

BLOCK = 50
SCORES = "scores.json"


class EvaluateConfig(Config):
    """What is measured."""

    metrics: tuple[str, ...] = Field(
        (),
        description="metrics beside the usual ones of CLIP and of the extractors given: "
        + ", ".join(name for name, metric in METRICS.items() if not metric.by_default),
    )
    inception: str | None = Field(
        None,
        description="path of FID's Inception weights (pt_inception-2015-12-05), or hub to download them; None: no FID",
    )
    inception_is_custom: bool = Field(
        False, description="take other weights of that network than the published ones: another protocol"
    )
    dinov2: str | None = Field(
        None,
        description="folder with the files of facebook/dinov2-large, or hub to download them; None: no fd_dinov2",
    )
    clip: str | None = Field(
        None,
        description="folder of a CLIP, or hub:OWNER/NAME, that looks and reads in place of the run's own: runs whose own CLIPs "
        "differ are compared by such a one",
    )
    reference: str | None = Field(
        None,
        description="path of an npz with mu and sigma of real images' Inception features, for FID; None: the training images",
    )
    reference_images: int = Field(
        50_000, ge=2, description="most training images that the generated are compared with, evenly spread"
    )
    reconstruction_images: int = Field(
        256, ge=2, description="real images for the VAE's reconstruction and the prior's diagnostics"
    )

    _listed = field_validator("metrics", mode="before")(listed)

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"there is no metric {name}; there are {', '.join(METRICS)}")
            kind = extractors.weights_of(METRICS[name].extractor)
            if kind not in self.weights and kind != "clip":
                raise ValueError(f"metric {name} needs evaluate.{kind}: {extractors.WEIGHTS[kind]}")
            if self._lacks_pictures(METRICS[name]):
                raise ValueError(
                    f"metric {name} needs the features of real images, and evaluate.reference has a mean and a covariance "
                    "alone: leave one of the two out"
                )
        return self

    @property
    def weights(self) -> dict[str, tuple[str, bool]]:
        """What `training.metrics.extractors.load` takes, by kind of weights."""
        given = {
            "inception": (self.inception, self.inception_is_custom),
            "dinov2": (self.dinov2, False),
            "clip": (self.clip, False),
        }
        return {kind: (path, custom) for kind, (path, custom) in given.items() if path}

    @property
    def chosen(self) -> tuple[str, ...]:
        """Metrics of the catalogue that are computed."""
        usual = [
            name
            for name, metric in METRICS.items()
            if metric.by_default
            and (metric.extractor == "clip" or metric.extractor in self.weights)
            and not self._lacks_pictures(metric)
        ]
        return tuple(dict.fromkeys((*usual, *self.metrics)))

    @property
    def extractors(self) -> tuple[str, ...]:
        """Extractors beside the run's own CLIP."""
        chosen = dict.fromkeys(METRICS[name].extractor for name in self.chosen)
        return tuple(name for name in chosen if name != "clip" or self.clip)

    def _lacks_pictures(self, metric: Metric) -> bool:
        kind = extractors.weights_of(metric.extractor)
        moments_alone = metric.extractor == "inception" and metric.needs != "real"
        return (
            bool(self.reference) and kind == "inception" and metric.needs != "nothing" and not moments_alone
        )


def run(config: EvaluateConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Extracts features, computes every metric that the inputs allow, and commits `scores.json`."""
    started = time.monotonic()
    parents = {role: snapshot.digest for role, snapshot in inputs.items()}
    tasks = _tasks(config, inputs, parents)
    weights = _weights(config)
    arguments = {"inputs": [(r, s.model_dump(), s.folder) for r, s in inputs.items()], "weights": weights}
    against = _real_pictures(config, tasks, weights)
    real = [task for task in tasks if task.payload["kind"] == REFERENCE]
    borrowed = borrow(real, workspace.folder, version=STAGE.version, facts=against, inputs=inputs)
    log.debug("%d of %d blocks of real pictures were looked at before", borrowed, len(real))
    records = map_shards(Measuring, arguments, tasks, workspace)
    by_kind: dict[str, list[ShardRecord]] = {}
    for task, record in zip(tasks, records, strict=True):
        by_kind.setdefault(task.payload["kind"], []).append(record)
    try:
        measured = _measure(config, inputs, workspace.folder, by_kind, weights)
    except ValueError as error:  # a metric refuses what it was given, such as features that hold NaN
        raise StageFailed(f"no scores: {error}") from error
    for sentence in measured["warnings"]:
        log.warning("%s", sentence)
    storage.write_bytes(storage.join(workspace.folder, SCORES), json.dumps(measured, indent=1).encode())
    facts = {"scores": {s["name"]: s["value"] for s in measured["scores"]}, "reference": against}
    files = (file_record(workspace.folder, SCORES),)
    return commit(STAGE, config, inputs, workspace, started=started, shards=records, files=files, facts=facts)


def _weights(config: EvaluateConfig) -> Weights:
    """Where each extractor's weights are, downloaded once here, and whether they are custom."""
    found = {}
    for name in config.extractors:
        kind = extractors.weights_of(name)
        path, custom = config.weights[kind]
        found[name] = (extractors.secured(kind, extractors.place_of(kind, path)), custom)
    return found


def _tasks(config: EvaluateConfig, inputs: Inputs, parents: dict[str, str]) -> list[ShardTask]:
    payloads: list[tuple[dict[str, Any], int]] = [
        ({"kind": GENERATED, "block": shard.index}, shard.samples) for shard in inputs["generate"].shards
    ]
    wanted: list[tuple[dict[str, Any], list[int]]] = [
        ({"kind": PARTS}, spread_indices(_count(inputs), config.reconstruction_images))
    ]
    if looking := _looking_at_real(config):
        rows = spread_indices(_count(inputs), config.reference_images)
        wanted.append(({"kind": REFERENCE, "extractors": looking}, rows))
    for what, rows in wanted:
        parts = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
        payloads += [({**what, "rows": part}, len(part)) for part in parts]
    return [ShardTask(index, payload, parents, weight) for index, (payload, weight) in enumerate(payloads)]


def _real_pictures(config: EvaluateConfig, tasks: Sequence[ShardTask], weights: Weights) -> dict[str, Any]:
    """What the features of the training images depend on besides the images, and under which indices they are kept."""
    return {
        "extractors": {
            name: extractors.digest_of(name, weights[name][0]) for name in _looking_at_real(config)
        },
        "rows": config.reference_images,
        "block": BLOCK,
        "first": next((task.index for task in tasks if task.payload["kind"] == REFERENCE), None),
    }


def _looking_at_real(config: EvaluateConfig) -> list[str]:
    """Extractors whose features of the training images are wanted."""
    compared = {METRICS[n].extractor for n in config.chosen if METRICS[n].needs in ("reference", "real")}
    return [n for n in config.extractors if n in compared and not (n == "inception" and config.reference)]


def _measure(
    config: EvaluateConfig,
    inputs: Inputs,
    folder: str,
    measured: Mapping[str, Sequence[ShardRecord]],
    weights: Weights,
) -> dict[str, Any]:
    """Every metric, from stored features: what `scores.json` holds."""
    judged = _judged(inputs["generate"])
    found = list(judged.scores)
    warnings: list[str] = []
    looked, against = {"clip": clip_of(inputs)}, {"parts": _training_images(inputs)}
    for name in dict.fromkeys(("clip", *config.extractors)):
        sample, looked[name], against[name] = _sample(name, config, inputs, folder, measured, weights)
        warnings += filter(None, [few(sample, name)])
        mine = [metric for metric in config.chosen if METRICS[metric].extractor == name]
        found += [scores.distribution_score(metric, sample) for metric in mine]
    cosines, of_parts = _parts(config, inputs, folder, measured[PARTS])
    found += of_parts
    return {
        "scores": [
            _row(score, deletions, inputs, looked, against).model_dump(mode="json")
            for score, deletions in found
        ],
        "prior": [score.model_dump() for score, _ in cosines],
        "attributes": {
            attribute: {label: share.model_dump() for label, share in shares.items()}
            for attribute, shares in judged.attributes.items()
        },
        "correct": judged.correct,
        "warnings": warnings,
    }


def _judged(generated: Snapshot) -> scores.Judged:
    """What is right in the generated pictures; they may be many, and are read only where a prompt has a truth, as demos' do."""
    prompts = read_prompts(generated.folder)
    truths = [prompt.truth for prompt in prompts]
    images = np.empty((0, 0, 0, 3), np.uint8)
    if any(truth is not None for truth in truths):
        images = _stored(generated.folder, "generated", generated.shards)
    return scores.judged(images, truths, [prompt.heldout for prompt in prompts], group=_group(generated))


def _group(generated: Snapshot) -> int:
    """Consecutive pictures that share a prompt."""
    return generated.config.get("images_per_prompt", 1)


def _row(
    score: scores.Score, deletions: Deletions | None, inputs: Inputs, looked: Looked, against: Against
) -> comparison.Measured:
    protocol = protocol_of(score, inputs, looked, against)
    return comparison.Measured(**score.model_dump(), protocol=protocol, deletions=deletions)


def _sample(
    name: str,
    config: EvaluateConfig,
    inputs: Inputs,
    folder: str,
    measured: Mapping[str, Sequence[ShardRecord]],
    weights: Weights,
) -> tuple[Sample, dict[str, Any], dict[str, Any]]:
    """Features of one extractor, and the fields of a protocol that tell it and the real images."""
    rows = spread_indices(_count(inputs), config.reference_images)
    against = _training_images(inputs) | {"reference_n": len(rows)}
    group = _group(inputs["generate"])
    if name not in config.extractors:
        fake, text = (_stored(folder, column, measured[GENERATED]) for column in ("img_emb", "text_emb"))
        real = ColumnSet([inputs["data"], inputs["embed"]]).rows("img_emb", rows)
        return _against_real(fake, real, text=text, group=group), clip_of(inputs), against
    path, custom = weights[name]
    looked = {
        "extractor": name,
        "extractor_digest": extractors.digest_of(name, path),
        "resize": extractors.RESIZE[name],
    }
    fake, head = _stored(folder, name, measured[GENERATED]), None
    text = _stored(folder, CLIP_TEXT, measured[GENERATED]) if name == "clip" else None
    if any(METRICS[n].needs == "nothing" and METRICS[n].extractor == name for n in config.chosen):
        head = extractors.load(name, path, is_custom=custom).head
    if name not in _looking_at_real(config):
        reference = inception_statistics(config.reference, config.inception) if config.reference else None
        if config.reference and reference:
            against = {"reference": checksum_of(config.reference).sha256, "reference_n": reference.n or 0}
        sample = Sample(fake, reference, text=text, head=head, accumulate=accumulate_on_cluster, group=group)
        return sample, looked, against
    real = _stored(folder, name, measured[REFERENCE])
    return _against_real(fake, real, text=text, head=head, group=group), looked, against


def _against_real(fake: np.ndarray, real: np.ndarray, **more: Any) -> Sample:
    reference = Gaussian.fitted(real, accumulate_on_cluster)
    return Sample(fake, reference, real, accumulate=accumulate_on_cluster, **more)


def _parts(
    config: EvaluateConfig, inputs: Inputs, folder: str, records: Sequence[ShardRecord]
) -> tuple[list[scores.Scored], list[scores.Scored]]:
    """The prior's diagnostics, and the scores of the VAE and the prior."""
    rows = spread_indices(_count(inputs), config.reconstruction_images)
    data = ColumnSet([inputs["data"], inputs["embed"]])
    predicted = _stored(folder, "predicted_emb", records)
    cosines = scores.prior_cosines(predicted, data.rows("img_emb", rows), data.rows("text_emb", rows))
    reconstructed = _stored(folder, "reconstructed", records)
    found = scores.reconstruction_scores(data.rows("image", rows), reconstructed)
    if "inception" in config.extractors:
        originals, copies = (_stored(folder, column, records) for column in (ORIGINAL, RECONSTRUCTED))
        found.append(scores.reconstruction_fid(originals, copies))
    return list(cosines.values()), [*found, cosines["prior_cosine"]]


def _training_images(inputs: Inputs) -> dict[str, Any]:
    return {"reference": inputs["data"].digest, "reference_n": _count(inputs)}


def _count(inputs: Inputs) -> int:
    """Samples that count: all, less those that `embed.min_clip_score` leaves out."""
    return len(ColumnSet([inputs["data"], inputs["embed"]]))


def _stored(folder: str, name: str, records: Sequence[ShardRecord]) -> np.ndarray:
    return np.concatenate([columns.open_array(folder, name, record.index) for record in records])


STAGE = Stage(
    name="evaluate",
    version=6,
    reads=lambda _: frozenset({"image", "caption", "img_emb", "text_emb", "generated"}),
    writes=lambda _: frozenset(),
    config=EvaluateConfig,
    run=run,
)
