"""What the prior and the denoiser share about CLIP embeddings and text hidden states.

Legend: B batch, D embedding width, T tokens, W text width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.systems.system import Columns

STATISTICS_ROWS = 65_536
"""Most rows that a statistic is taken over."""
_MIN_STD = 1e-4


def spread_indices(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread; a function of both numbers alone."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)).tolist()


def widened(embeddings: Tensor) -> Tensor:
    """Unit vectors (B, D) stretched to length sqrt(D), so that one entry has variance about 1 for any D.

    Networks see embeddings in this scale (Ramesh et al. 2022, arXiv 2204.06125, appendix C multiplies by 17.2 = sqrt(296)).
    """
    return embeddings * embeddings.shape[-1] ** 0.5


def widened_statistics(columns: Columns) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) float32 of the dataset's image embeddings in the scale of `widened`."""
    indices = spread_indices(len(columns), STATISTICS_ROWS)
    total, squares = 0.0, 0.0
    for start in range(0, len(indices), 4096):
        rows = columns.rows("img_emb", indices[start : start + 4096]).astype(np.float64)
        total, squares = total + rows.sum(0), squares + np.square(rows).sum(0)
    mean = total / len(indices)
    std = np.sqrt(np.maximum(squares / len(indices) - np.square(mean), _MIN_STD**2))
    scale = np.sqrt(len(mean))
    return torch.from_numpy(scale * mean).float(), torch.from_numpy(scale * std).float()


def padded(states: Sequence[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, W) float32, zero after each caption's end, and their lengths (B,) int64; cut to T = `tokens`."""
    out = torch.zeros(len(states), tokens, states[0].shape[-1], device=states[0].device)
    lengths = torch.tensor([min(len(s), tokens) for s in states], device=out.device)
    for row, s in zip(out, states, strict=True):
        row[: min(len(s), tokens)] = s[:tokens]
    return out, lengths


@functools.lru_cache(maxsize=64)
def resident(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, copied there once: a step that copies waits for its device."""
    return tensor.to(device)


def token_mask(lengths: Tensor, tokens: int) -> Tensor:
    """(B, T) bool, True on the tokens of each caption."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def chosen(take_first: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Per sample, `first` where `take_first` (B,) is True, else `second`; the two broadcast against each other."""
    return torch.where(take_first.view(-1, *[1] * (second.ndim - 1)), first, second)
