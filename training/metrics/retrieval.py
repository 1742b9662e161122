"""Caption retrieval: whether a picture finds its own caption among all captions, and a caption its picture.

Legend: N samples, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.metrics.clip_score import unit_rows

RANKS = (1, 5, 10)
_TILE = 1024
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False, slots=True)
class Retrieval:
    """Ranks, 0 the best."""

    caption_rank: np.ndarray
    """(N,) int64: how many other captions are as near to picture i as its own."""
    picture_rank: np.ndarray
    """(N,) int64: how many pictures of other captions are as near to caption i as its own."""


def recalled(ranks: np.ndarray, at: int) -> np.ndarray:
    """(N,) float64: 1 where the own partner is among the first `at`. Its mean is R@at."""
    return (ranks < at).astype(np.float64)


def retrieval(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> Retrieval:
    """Ranks by cosine of row-aligned embeddings (N, D), of any norm, in float64.

    A tie counts against the own partner, and equal captions share one place, since neither could be told from the other.
    Raises ValueError as `clip_score` does.
    """
    if image_embeddings.shape != text_embeddings.shape:
        raise ValueError(
            f"image embeddings {image_embeddings.shape} and text embeddings {text_embeddings.shape} are not row-aligned: "
            "give one of each per sample, from the same CLIP"
        )
    images, texts = unit_rows(image_embeddings, "image"), unit_rows(text_embeddings, "text")
    _, same_caption = np.unique(texts, axis=0, return_inverse=True)
    same_caption = same_caption.reshape(-1)
    own = (images * texts).sum(axis=1)
    captions, pictures = np.zeros(len(own), np.int64), np.zeros(len(own), np.int64)
    first_of = np.unique(same_caption, return_index=True)[1]
    for start in range(0, len(own), _TILE):
        rows = slice(start, start + _TILE)
        near = images[rows] @ texts[first_of].T >= own[rows, None] - _ROUNDING
        near[np.arange(near.shape[0]), same_caption[rows]] = False
        captions[rows] = near.sum(axis=1)
        near = texts[rows] @ images.T >= own[rows, None] - _ROUNDING
        near &= same_caption[rows, None] != same_caption
        pictures[rows] = near.sum(axis=1)
    return Retrieval(captions, pictures)
