"""Datasets that are drawn and not read: each a function of its count and seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.config import fingerprint

VERSIONS = {"shapes": 1, "digits": 1}
"""Raised when a built-in dataset draws other pictures than before for the same count and seed."""


def draw(kind: str, count: int, seed: int, folder: Path) -> Path:
    """The image folder of the dataset, drawn under `folder` unless it is there already."""
    target = folder / f"{kind}-{digest(kind, count, seed)}"
    GENERATORS[kind](target, count, seed)
    return target


def pictures(kind: str, count: int) -> int:
    """Pictures that the dataset draws when it is asked for `count`; there are only so many digits."""
    if kind == "digits":
        from data.digits import TRAINING_DIGITS

        return min(count, TRAINING_DIGITS)
    return count


def digest(kind: str, count: int, seed: int, limit: int | None = None) -> str:
    """Identity of the dataset's first `limit` rows: what draws them."""
    return fingerprint(kind, count, seed, limit, VERSIONS[kind])


def _draw_shapes(folder: Path, count: int, seed: int) -> None:
    from data import shapes

    shapes.write_folder(folder, count=count, seed=seed)


def _draw_digits(folder: Path, count: int, seed: int) -> None:
    from data import digits

    digits.write_folder(folder, count=count, seed=seed)


GENERATORS: dict[str, Callable[[Path, int, int], None]] = {"shapes": _draw_shapes, "digits": _draw_digits}
"""kind -> what draws it: (folder, count, seed)."""
