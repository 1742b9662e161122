"""The protocol of each score of a run: what its value depends on, read from the snapshots that it was computed from."""

from __future__ import annotations

from typing import Any

from stages.contract import Inputs
from stages.prompts import FILE
from training.metrics.catalogue import METRICS
from training.metrics.extractors import RESIZE
from training.metrics.protocol import Protocol
from training.metrics.scores import Score
from training.systems.unclip import Sampling

Looked = dict[str, dict[str, Any]]
"""Extractor -> the fields of a protocol that tell it: its name, its weights' digest, its resize rule."""
Against = dict[str, dict[str, Any]]
"""Extractor -> the fields that tell the real pictures: their digest and their number."""


def clip_of(inputs: Inputs) -> dict[str, Any]:
    """How the run's own CLIP looks at a picture."""
    return {"extractor": "clip", "extractor_digest": inputs["clip"].digest, "resize": RESIZE["clip"]}


def protocol_of(score: Score, inputs: Inputs, looked: Looked, against: Against) -> Protocol:
    """The protocol of `score`: of the run's parts, or a metric of the catalogue."""
    parts = {
        "vae_psnr": {**against["parts"], **_weights("vae", inputs)},
        "vae_ssim": {**against["parts"], **_weights("vae", inputs)},
        "vae_rfid": {**looked.get("inception", {}), **against["parts"], **_weights("vae", inputs)},
        "prior_cosine": {
            **clip_of(inputs),
            **against["parts"],
            **_weights("prior", inputs),
            "sampling": _sampling(inputs, "prior_"),
        },
    }
    if score.name in parts:
        return Protocol(metric=score.name, n=score.n, **parts[score.name])
    if score.name not in METRICS:
        return Protocol(metric=score.name, n=score.n, extractor="recogniser", **_drawn(inputs))
    metric = METRICS[score.name]
    reference = against[metric.extractor] if metric.needs in ("reference", "real") else {}
    return Protocol(
        metric=score.name,
        n=score.n,
        settings=metric.settings,
        **looked[metric.extractor],
        **reference,
        **_drawn(inputs),
    )


def _weights(role: str, inputs: Inputs) -> dict[str, Any]:
    return {"weights": {role: inputs[role].digest}}


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
