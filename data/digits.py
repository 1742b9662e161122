"""The built-in *digits*: scikit-learn's bundled handwritten digits as 32 px pictures with captions, and a judge of them.

The last 297 of the 1797 digits are never written for training: they measure the judge.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.shapes import publish_folder

SIDE = 32
TRAINING_DIGITS = 1500
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_GRID = 8
_LEVELS = 16
_PHRASINGS = (
    "a handwritten {name}",
    "the digit {name}",
    "the number {name} in handwriting",
    "a {name} written by hand",
    "{name}, written in ink",
    "a picture of a handwritten {name}",
)


def render(grid: NDArray[np.float64]) -> NDArray[np.uint8]:
    """(32, 32, 3) uint8 RGB, dark ink on white, of an (8, 8) `grid` of ink from 0 (paper) to 16."""
    paper = Image.fromarray(np.round(255 * (1 - grid / _LEVELS)).astype(np.uint8))
    return np.asarray(paper.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))


def caption(digit: int, rng: np.random.Generator) -> str:
    """One phrasing of `digit` (0 to 9), drawn by `rng`."""
    return phrasings(digit)[rng.integers(len(_PHRASINGS))]


def phrasings(digit: int) -> list[str]:
    """Every caption that `digit` (0 to 9) can have, always in the same order."""
    return [phrasing.format(name=NAMES[digit]) for phrasing in _PHRASINGS]


def recognise(image: NDArray[np.uint8]) -> int:
    """The digit that (H, W, 3) uint8 RGB `image` shows as dark ink on white; H and W at least 8."""
    return int(_classifier().predict([_features(image)])[0])


def matches(image: NDArray[np.uint8], truth: dict[str, Any]) -> dict[str, bool]:
    """{"digit": whether `image` (H, W, 3) uint8 shows `truth["digit"]`}."""
    return {"digit": recognise(image) == truth["digit"]}


def write_folder(folder: Path, *, count: int, seed: int) -> None:
    """Writes min(`count`, 1500) captioned digits and prompts for all ten, once: an existing folder stays.

    The layout is that of `data.shapes.write_folder`; no prompt is held out. Raises ValueError for a `count` below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; a dataset has at least 1 picture")
    publish_folder(folder, itertools.islice(_pictures(seed), count), _prompts(seed))


def judge_accuracy() -> float:
    """Share of the 297 digits never written for training that `recognise` names rightly, as rendered."""
    grids, labels = _bundled()
    named = [recognise(render(grid)) for grid in grids[TRAINING_DIGITS:]]
    return float(np.mean(np.equal(named, labels[TRAINING_DIGITS:])))


def _pictures(seed: int) -> Iterator[tuple[NDArray[np.uint8], str]]:
    grids, labels = _bundled()
    for i, row in enumerate(np.random.default_rng((seed, 0)).permutation(TRAINING_DIGITS)):
        yield render(grids[row]), caption(int(labels[row]), np.random.default_rng((seed, 1, i)))


def _prompts(seed: int) -> Iterator[dict[str, Any]]:
    """Every phrasing of every digit once, all ten digits before one comes again."""
    rng = np.random.default_rng((seed, 2))
    turns = [rng.permutation(len(_PHRASINGS)) for _ in NAMES]
    for turn in range(len(_PHRASINGS)):
        for digit in rng.permutation(len(NAMES)).tolist():
            truth = {"kind": "digits", "digit": digit}
            yield {"text": phrasings(digit)[turns[digit][turn]], "heldout": False, "truth": truth}


@functools.cache
def _bundled() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(1797, 8, 8) ink from 0 to 16 and (1797,) digits."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels).reshape(-1, _GRID, _GRID), np.asarray(labels)


@functools.cache
def _classifier() -> Any:
    """A support vector machine that saw the training digits as `recognise` sees pictures."""
    from sklearn.svm import SVC

    grids, labels = _bundled()
    features = [_features(render(grid)) for grid in grids[:TRAINING_DIGITS]]
    machine = SVC(gamma=0.001, C=10)  # pyright: ignore[reportArgumentType]
    return machine.fit(features, labels[:TRAINING_DIGITS])


def _features(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(64,) ink from 0 to 16, averaged over the cells of an 8 x 8 grid."""
    grey = Image.fromarray(image).convert("L").resize((_GRID, _GRID), Image.Resampling.BOX)
    return _LEVELS * (1 - np.asarray(grey, np.float64).ravel() / 255)
