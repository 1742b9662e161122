"""Inception Score: how sure a classifier is of each generated picture, and how varied the classes are. No real picture.

Legend: N samples, C classes, G blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

from training.metrics.intervals import Estimate, index_blocks
from training.metrics.moments import finite_rows

BLOCKS = 16
"""Deletions of the jackknife."""
_TILE = 1024


def inception_score(features: np.ndarray, head: np.ndarray, *, splits: int = 1, group: int = 1) -> Estimate:
    """exp(mean KL(p(class | picture) || p(class))), 1 to C, of pooled features (N, D) (Salimans et al. 2016, sec. 4).

    `head` (C, D) is the network's last layer, used without its bias as the published graph does. `splits` consecutive
    parts are scored apart and averaged: papers use 10 parts of 5,000, which gives less than one part does. Raises
    ValueError for rows that are not finite and for fewer than two samples a split.
    """
    if len(features) < 2 * splits:
        raise ValueError(
            f"an Inception Score of {splits} splits needs {2 * splits} images, got {len(features)}"
        )
    parts = [slice(i * len(features) // splits, (i + 1) * len(features) // splits) for i in range(splits)]
    blocks = index_blocks(len(features), BLOCKS, group)
    pieces = [_pieces(features, head, part, blocks) for part in parts]
    value = float(np.mean([_score(*_total(piece)) for piece in pieces]))
    return Estimate.of(value, _deleted(pieces, len(blocks)), blocks)


Sums = tuple[int, float, np.ndarray]
"""Samples, sum of p log p over them and all classes, sum of p (C,)."""


def _pieces(features: np.ndarray, head: np.ndarray, part: slice, blocks: list[np.ndarray]) -> dict[int, Sums]:
    """Block of the jackknife -> sums over its samples in one part."""
    found: dict[int, Sums] = {}
    for number, block in enumerate(blocks):
        start, stop = max(part.start, int(block[0])), min(part.stop, int(block[-1]) + 1)
        tiles = range(start, stop, _TILE)
        sums = [_sums(features, head, at, min(at + _TILE, stop)) for at in tiles]
        if sums:
            found[number] = _added(sums)
    return found


def _sums(features: np.ndarray, head: np.ndarray, start: int, stop: int) -> Sums:
    logits = finite_rows(features[start:stop], first_row=start) @ head.T.astype(np.float64)
    log_p = special.log_softmax(logits, axis=1)
    p = np.exp(log_p)
    return stop - start, float((p * log_p).sum()), p.sum(axis=0)


def _deleted(pieces: list[dict[int, Sums]], num_blocks: int) -> list[float]:
    def without(block: int) -> Callable[[dict[int, Sums]], dict[int, Sums]]:
        return lambda piece: {number: sums for number, sums in piece.items() if number != block}

    found = []
    for block in range(num_blocks):
        left = [rest for rest in map(without(block), pieces) if rest]
        found.append(float(np.mean([_score(*_total(piece)) for piece in left])))
    return found


def _total(piece: dict[int, Sums]) -> Sums:
    return _added(list(piece.values()))


def _added(sums: list[Sums]) -> Sums:
    return sum(s[0] for s in sums), sum(s[1] for s in sums), np.sum([s[2] for s in sums], axis=0)


def _score(count: int, negative_entropy: float, marginal: np.ndarray) -> float:
    mean = marginal / count
    return float(np.exp(negative_entropy / count - special.xlogy(mean, mean).sum()))
