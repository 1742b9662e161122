"""Prompt accuracy: the share of generated pictures that show what their prompt asked for, where a recogniser can tell.

Legend: N pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data import digits, shape_judge
from training.metrics.reconstruction import require_pictures

Matches = Callable[[np.ndarray, dict[str, Any]], dict[str, bool]]
"""(image (H, W, 3) uint8, truth) -> whether each attribute of the truth is seen in the image."""

RECOGNISERS: dict[str, Matches] = {"shapes": shape_judge.matches, "digits": digits.matches}
"""A truth's `kind` -> its recogniser: exact rules or a fixed classifier, never the model under test."""


@dataclass(frozen=True, eq=False, slots=True)
class Accuracy:
    """What is right, picture by picture."""

    correct: np.ndarray
    """(N,) bool: every attribute right."""
    by_attribute: dict[str, np.ndarray]
    """Attribute -> (N,) float64: 1 where it is right, 0 where it is wrong, NaN where the truth does not have it."""


def prompt_accuracy(images: np.ndarray, truths: Sequence[Mapping[str, Any]]) -> Accuracy:
    """Accuracy of `images` (N, H, W, 3) uint8 against `truths`, one record per image with its `kind`.

    Raises ValueError for no image, another dtype or shape, a count that differs, or an unknown kind.
    """
    require_pictures(images)
    if len(images) != len(truths):
        raise ValueError(
            f"{len(images)} images for {len(truths)} truths: give one truth per image, in the same order"
        )
    found = [_recogniser(truth)(image, dict(truth)) for image, truth in zip(images, truths, strict=True)]
    attributes = dict.fromkeys(attribute for matches in found for attribute in matches)
    return Accuracy(
        correct=np.array([all(matches.values()) for matches in found], dtype=bool),
        by_attribute={a: np.array([float(matches.get(a, np.nan)) for matches in found]) for a in attributes},
    )


def _recogniser(truth: Mapping[str, Any]) -> Matches:
    kind = truth.get("kind")
    if kind not in RECOGNISERS:
        raise ValueError(
            f"no recogniser for a truth of kind {kind!r}: allowed are {', '.join(sorted(RECOGNISERS))}"
        )
    return RECOGNISERS[kind]
