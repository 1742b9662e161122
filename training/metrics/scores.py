"""Headline numbers: each metric's value with its interval, from stored features.

Legend: N generated images, M real images, K reconstructed images, D embedding width, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data.config import Config
from training.metrics.clip_score import clip_score
from training.metrics.frechet import frechet_distance
from training.metrics.intervals import frechet_interval, mean_interval, wilson_interval
from training.metrics.kernel import cmmd
from training.metrics.moments import Moments, moments_of
from training.metrics.prompt_accuracy import prompt_accuracy
from training.metrics.reconstruction import psnr

JACKKNIFE_BLOCKS = 16
"""Deletions for statistics without a closed form; each recomputes the metric."""


class Score(Config):
    """A number with its 95 % interval and what it was computed from."""

    name: str
    value: float
    low: float
    high: float
    n: int
    better: Literal["higher", "lower"]
    meaning: str


def accuracy_scores(
    images: np.ndarray, truths: Sequence[Mapping[str, Any] | None], heldout: Sequence[bool]
) -> list[Score]:
    """`prompt_accuracy` over prompts of seen combinations and `prompt_accuracy_heldout` over the others, of images
    (N, H, W, 3) uint8; only those that have a truth count, and a group without any gives no score."""
    found = []
    for name, wanted in (("prompt_accuracy", False), ("prompt_accuracy_heldout", True)):
        rows = [i for i, truth in enumerate(truths) if truth is not None and heldout[i] is wanted]
        if not rows:
            continue
        correct = prompt_accuracy(images[rows], [truths[i] or {} for i in rows]).correct
        low, high = wilson_interval(int(correct.sum()), len(rows))
        which = "held out of training" if wanted else "seen in training"
        meaning = f"share of images with every attribute right, combinations {which}"
        found.append(_score(name, float(correct.mean()), low, high, len(rows), "higher", meaning))
    return found


def embedding_scores(real: np.ndarray, fake: np.ndarray, text: np.ndarray) -> list[Score]:
    """`fd_clip`, `cmmd` and `clip_score` of generated images, from CLIP embeddings of real images (M, D), generated images
    (N, D) and their prompts (N, D)."""
    reference = moments_of(real)
    fd = frechet_distance(reference, moments_of(fake)).value
    distance = cmmd(real, fake)
    fit = clip_score(fake, text)
    return [
        _score(
            "fd_clip",
            fd,
            *frechet_interval(reference, fake),
            len(fake),
            "lower",
            "Fréchet distance on CLIP features",
        ),
        _score(
            "cmmd",
            distance.unbiased,
            *distance.interval,
            len(fake),
            "lower",
            "CLIP maximum mean discrepancy, unbiased, x1000",
        ),
        _score(
            "clip_score",
            fit.mean,
            *mean_interval(fit.per_sample),
            len(fake),
            "higher",
            "cosine of image and prompt",
        ),
    ]


def reconstruction_score(originals: np.ndarray, reconstructed: np.ndarray) -> Score:
    """`vae_psnr` in dB over K images (K, H, W, 3) uint8."""
    measured = psnr(originals, reconstructed)
    finite = measured.per_image[np.isfinite(measured.per_image)]
    return _score(
        "vae_psnr", measured.mean, *mean_interval(finite), len(originals), "higher", "VAE reconstruction, dB"
    )


def prior_cosines(predicted: np.ndarray, image: np.ndarray, text: np.ndarray) -> dict[str, Score]:
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
    found = {name: _cosine(name, a, b, meaning) for name, (a, b, meaning) in pairs.items()}
    gap = clip_score(predicted, text).per_sample - clip_score(text, image).per_sample
    found["difference_from_baseline"] = _score(
        "difference_from_baseline",
        float(gap.mean()),
        *mean_interval(gap),
        len(gap),
        "lower",
        "to_text less text_baseline; near 0 is right",
    )
    return found


def fid_score(reference: Moments, fake: np.ndarray) -> Score:
    """`fid` from the moments of real images' Inception features and those of generated images (N, 2048)."""
    value = frechet_distance(reference, moments_of(fake)).value
    interval = frechet_interval(reference, fake, max_blocks=JACKKNIFE_BLOCKS)
    return _score("fid", value, *interval, len(fake), "lower", "Fréchet Inception distance, tf1 resize")


def _cosine(name: str, a: np.ndarray, b: np.ndarray, meaning: str) -> Score:
    measured = clip_score(a, b)
    return _score(
        name, measured.mean, *mean_interval(measured.per_sample), len(a), "higher", f"cosine of {meaning}"
    )


def _score(
    name: str, value: float, low: float, high: float, n: int, better: Literal["higher", "lower"], meaning: str
) -> Score:
    return Score(name=name, value=value, low=low, high=high, n=n, better=better, meaning=meaning)
