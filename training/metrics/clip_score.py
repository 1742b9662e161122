"""CLIP score: how well pictures fit their captions, as a raw cosine; the scaled forms that papers print are the catalogue's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.metrics.moments import finite_rows


@dataclass(frozen=True, eq=False, slots=True)
class ClipScore:
    """Cosines in [-1, 1]: no factor 100 or 2.5, no clipping at 0, no caption prefix."""

    mean: float
    per_sample: np.ndarray
    """(N,) float64."""


def clip_score(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> ClipScore:
    """Cosine between row i of both (N, D) arrays, of any norm, in float64; and the mean.

    Raises ValueError for different shapes, for rows that are not finite, and for a row of zeros, which has no direction.
    """
    if image_embeddings.shape != text_embeddings.shape:
        raise ValueError(
            f"image embeddings {image_embeddings.shape} and text embeddings {text_embeddings.shape} are not row-aligned: "
            "give one of each per sample, from the same CLIP"
        )
    images, texts = unit_rows(image_embeddings, "image"), unit_rows(text_embeddings, "text")
    cosines = np.clip((images * texts).sum(axis=1), -1.0, 1.0)
    return ClipScore(float(cosines.mean()), cosines)


def unit_rows(embeddings: np.ndarray, what: str) -> np.ndarray:
    """The rows (N, D) at length 1, float64; `what` names them in the ValueError for a row without a direction."""
    rows = finite_rows(embeddings)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not norms.all():
        row = int(np.flatnonzero(norms[:, 0] == 0.0)[0])
        raise ValueError(
            f"the {what} embedding of sample {row} is all zeros and has no direction: embed that sample again"
        )
    return rows / norms
