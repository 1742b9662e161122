"""Folders of captioned pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def add_pictures(folder: Path, numbers: range, side: int = 32) -> Path:
    """A picture of noise with its caption for each of `numbers`, the same for the same number; returns `folder`."""
    folder.mkdir(exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(f"picture number {i}")
    return folder
