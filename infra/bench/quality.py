"""What reducing a JPEG while decoding it costs in quality: decibels against the full decode.

    python infra/bench/quality.py PHOTOS [--json quality.json]

PHOTOS is a folder of JPEG photographs. Each is made 64 and 40 px (where it is decoded at a half and at a quarter), and
256 px, and so are mosaics of 12 megapixels of them (decoded at a quarter). `reduced` is what `data.images.prepare` stores, as
PNG; `full` the same resampling of the whole picture; `area` OpenCV's INTER_AREA of the whole picture, which img2dataset
uses. Each is held against Pillow's full decode and Lanczos filter; the last column holds `reduced` against `full`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from shard import mosaic, photographs

from data.geometry import place
from data.image_rules import ImageRules
from data.images import prepare
from data.resampling import resample

Decibels = dict[str, float]


def main() -> None:
    """Measures every picture at every size, prints medians and least, and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    paths = photographs(options.photos)
    photos = [path.read_bytes() for path in paths]
    large = [mosaic([paths[(4 * n + k) % len(paths)] for k in range(4)]) for n in range(6)]
    found = {f"photographs to {size} px": [decibels(p, size) for p in photos] for size in (64, 40, 256)}
    found["12 megapixels to 256 px"] = [decibels(p, 256) for p in large]
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def decibels(payload: bytes, size: int) -> Decibels:
    """PSNR of the three ways to make a JPEG the middle square of `size` px, and of ours against the full decode."""
    rules = ImageRules(image_size=size, encode_format="png")
    with Image.open(io.BytesIO(payload)) as image:
        whole = image.convert("RGB")
    part = place(whole.size, rules)
    box = (part.left, part.top, part.left + part.width, part.top + part.height)
    square = np.asarray(whole.crop(box))
    exact = np.asarray(whole.crop(box).resize(part.size, Image.Resampling.LANCZOS))
    with Image.open(io.BytesIO(prepare(payload, rules).payload)) as stored:
        reduced = np.asarray(stored)
    full = resample(square, (part.width, part.height), part.size)
    area = cv2.resize(square, part.size, interpolation=cv2.INTER_AREA)
    against = {"reduced": reduced, "full": full, "area": area}
    return {name: psnr(pixels, exact) for name, pixels in against.items()} | {
        "reduced against full": psnr(reduced, full)
    }


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Decibels between two uint8 pictures; 99 where they are equal."""
    error = float(np.mean((first.astype(float) - second.astype(float)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def show(found: dict[str, list[Decibels]]) -> None:
    """One row per size: median and least decibels."""
    names = list(next(iter(found.values()))[0])
    table = Table("what", *names, title="decibels: median (least)")
    for what, each in found.items():
        cells = ([one[name] for one in each] for name in names)
        table.add_row(what, *(f"{median(values):.1f} ({min(values):.1f})" for values in cells))
    Console().print(table)


if __name__ == "__main__":
    main()
