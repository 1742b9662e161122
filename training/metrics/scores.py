"""Headline numbers: each metric's value with its interval, from stored features.

Legend: N generated images, M real images, K reconstructed images, D embedding width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.config import Config
from training.metrics.catalogue import FRECHET_BLOCKS, METRICS, Sample
from training.metrics.clip_score import clip_score
from training.metrics.frechet import Gaussian
from training.metrics.intervals import (
    Deletions,
    Estimate,
    frechet_estimate,
    mean_interval,
    share_interval,
)
from training.metrics.prompt_accuracy import prompt_accuracy
from training.metrics.reconstruction import SSIM_WINDOW, psnr, ssim

OF_THE_PARTS = (
    "prompt_accuracy", "prompt_accuracy_heldout", "vae_psnr", "vae_ssim", "vae_rfid", "prior_cosine"
)  # fmt: skip
"""Metrics of a run that need its parts or its data's truth; those of two sets of pictures are in the catalogue."""


class Score(Config):
    """A number with its 95 % interval and what it was computed from."""

    name: str
    value: float
    low: float
    high: float
    n: int
    better: Literal["higher", "lower"]
    meaning: str
    facts: dict[str, float | str] = {}
    """How far the value can be believed, as the metric itself tells."""


Scored = tuple[Score, Deletions | None]
"""A score, and its deletions where a paired comparison can use them."""


class Share(Config):
    """How many of `n` pictures are right, as a share with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class Judged:
    """What a recogniser says of pictures whose prompts have a truth."""

    scores: list[Scored]
    """`prompt_accuracy` over prompts of seen combinations, `prompt_accuracy_heldout` over the others; none without a picture."""
    attributes: dict[str, dict[str, Share]]
    """attribute -> {"seen": share, "held out": share}"""
    correct: list[bool | None]
    """Per picture: every attribute right; None where its prompt has no truth."""


def judged(
    images: np.ndarray, truths: Sequence[Mapping[str, Any] | None], heldout: Sequence[bool], *, group: int = 1
) -> Judged:
    """Accuracy of images (N, H, W, 3) uint8, `group` of which share each prompt; without any truth `images` is not read."""
    rows = [i for i, truth in enumerate(truths) if truth is not None]
    if not rows:
        return Judged([], {}, [None] * len(truths))
    found = prompt_accuracy(images[rows], [truths[i] or {} for i in rows])
    verdicts: list[bool | None] = [None] * len(truths)
    for row, right in zip(rows, found.correct.tolist(), strict=True):
        verdicts[row] = right
    is_heldout = np.array([heldout[i] for i in rows])
    scores, attributes = [], {}
    for label, which, wanted in (("seen", "seen in", ~is_heldout), ("held out", "held out of", is_heldout)):
        name = "prompt_accuracy" if label == "seen" else "prompt_accuracy_heldout"
        meaning = f"share of images with every attribute right, combinations {which} training"
        if wanted.any():
            scores.append(_share_score(name, found.correct[wanted], meaning, group))
        for attribute, right in found.by_attribute.items():
            counted = right[wanted & ~np.isnan(right)]
            if len(counted):
                attributes.setdefault(attribute, {})[label] = _share(counted, group)
    return Judged(scores, attributes, verdicts)


def _share(right: np.ndarray, group: int) -> Share:
    low, high = share_interval(right, group=group)
    return Share(value=float(right.mean()), low=low, high=high, n=len(right))


def _share_score(name: str, right: np.ndarray, meaning: str, group: int) -> Scored:
    found = _share(right, group)
    score = _score(name, found.value, found.low, found.high, found.n, "higher", meaning)
    return score, Estimate.of_mean(right, group=group).deletions if len(right) > 1 else None


def distribution_score(name: str, sample: Sample) -> Scored:
    """The catalogue's metric `name` of `sample`."""
    metric = METRICS[name]
    found = metric.compute(sample)
    meaning = f"{metric.meaning}; {found.note}" if found.note else metric.meaning
    n, facts = len(sample.fake), dict(found.facts)
    return _score(name, found.value, *found.interval, n, metric.better, meaning, facts), found.deletions


def reconstruction_scores(originals: np.ndarray, reconstructed: np.ndarray) -> list[Scored]:
    """`vae_psnr` in dB and, where pictures are large enough for its window, `vae_ssim`, over K images (K, H, W, 3) uint8."""
    found = [_mean("vae_psnr", psnr(originals, reconstructed).per_image, "VAE reconstruction, dB")]
    if min(originals.shape[1:3]) >= SSIM_WINDOW:
        alike = ssim(originals, reconstructed).per_image
        found.append(_mean("vae_ssim", alike, "VAE reconstruction, structural similarity"))
    return found


def reconstruction_fid(originals: np.ndarray, reconstructed: np.ndarray) -> Scored:
    """`vae_rfid`: the Fréchet Inception distance of reconstructions from their originals, of features (K, 2048) each."""
    found = frechet_estimate(Gaussian.fitted(originals), reconstructed, max_blocks=FRECHET_BLOCKS)
    low, high = (max(end, 0.0) for end in found.interval)
    meaning = "FID of the VAE's reconstructions from their originals"
    return _score("vae_rfid", found.value, low, high, len(originals), "lower", meaning), found.deletions


def prior_cosines(predicted: np.ndarray, image: np.ndarray, text: np.ndarray) -> dict[str, Scored]:
    """How near the prior's predicted image embeddings (K, D) come to the true ones, and to what they should not resemble:
    the seven diagnostics, those of DALLE2-pytorch's prior among them.

    `prior_cosine` is the headline. `text_baseline` takes the text embedding itself for a prediction. A prediction that is
    nearer to its text than true images are (`difference_from_baseline` well above 0) is overfitted to the text.
    `unrelated_images` says what `unrelated` would be for a perfect prior.
    """
    other_image, other_text = (np.roll(each, len(each) // 2, axis=0) for each in (image, text))
    pairs = {
        "prior_cosine": (predicted, image, "predicted and true image embedding"),
        "unrelated": (predicted, other_image, "predicted and another sample's image embedding"),
        "text_baseline": (text, image, "text embedding and true image embedding"),
        "to_text": (predicted, text, "predicted image embedding and text embedding"),
        "unrelated_caption": (predicted, other_text, "predicted image embedding and another sample's text"),
        "unrelated_images": (image, other_image, "true image embedding and another sample's"),
    }
    cosines = {name: clip_score(a, b).per_sample for name, (a, b, _) in pairs.items()}
    found = {
        name: _mean(name, cosines[name], f"cosine of {meaning}") for name, (*_, meaning) in pairs.items()
    }
    name, gap = "difference_from_baseline", cosines["to_text"] - cosines["text_baseline"]
    found[name] = _mean(name, gap, "to_text less text_baseline; near 0 is right", better="lower")
    return found


def _mean(
    name: str, values: np.ndarray, meaning: str, better: Literal["higher", "lower"] = "higher"
) -> Scored:
    found = Estimate.of_mean(values)
    low, high = mean_interval(values)
    return _score(name, float(values.mean()), low, high, len(values), better, meaning), found.deletions


def _score(
    name: str,
    value: float,
    low: float,
    high: float,
    n: int,
    better: Literal["higher", "lower"],
    meaning: str,
    facts: dict[str, float | str] | None = None,
) -> Score:
    told = facts or {}
    return Score(name=name, value=value, low=low, high=high, n=n, better=better, meaning=meaning, facts=told)
