"""A folder of pictures -> features on disk, in fixed micro-batches; memory does not grow with the number of pictures.

Legend: N pictures, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import images
from data.errors import SampleError, UserError
from data.folders import is_image
from training.metrics.extractors import MICRO_BATCH, Extractor, pictures

Progress = Callable[[int, int], None]
"""(pictures done, pictures in all)"""


@dataclass(frozen=True)
class Extracted:
    """Features of one folder."""

    features: dict[str, np.ndarray]
    """extractor -> (N, D) float32, a read-only memory map, row i of picture i."""
    sizes: frozenset[tuple[int, int]]
    """(width, height) that occur."""


def picture_files(folder: str | Path) -> list[Path]:
    """The picture files anywhere under `folder`, sorted by relative path. Raises UserError for fewer than two."""
    root = Path(folder)
    files = sorted(p for p in root.rglob("*") if is_image(p.name) and p.is_file())
    if not any(root.iterdir()):
        raise UserError(f"{folder} is empty: give a folder of pictures")
    if not files:
        raise UserError(f"{folder} has no pictures (.png, .jpg, .webp …): give a folder of pictures")
    if len(files) == 1:
        raise UserError(
            f"{folder} has one picture, {files[0].name}: a distribution needs many, and two at least"
        )
    return files


def extract(
    files: Sequence[Path], extractors: Sequence[Extractor], folder: Path, report: Progress = lambda *_: None
) -> Extracted:
    """Features of `files` by every extractor, kept as .npy files in `folder`; each picture is decoded once.

    Raises UserError naming a file that is no whole picture, or whose features are not finite.
    """
    return _extract(_batches(files), [str(file) for file in files], extractors, folder, report)


def extract_arrays(
    images: np.ndarray, extractors: Sequence[Extractor], folder: Path, report: Progress = lambda *_: None
) -> Extracted:
    """As `extract`, of pictures (N, H, W, 3) uint8."""
    batches = ((at, list(images[at : at + MICRO_BATCH])) for at in range(0, len(images), MICRO_BATCH))
    names = [f"picture {number}" for number in range(len(images))]
    return _extract(batches, names, extractors, folder, report)


def _extract(
    batches: Iterable[tuple[int, list[np.ndarray]]],
    names: Sequence[str],
    extractors: Sequence[Extractor],
    folder: Path,
    report: Progress,
) -> Extracted:
    stored: dict[str, np.ndarray] = {}
    sizes: set[tuple[int, int]] = set()
    for start, decoded in batches:
        sizes |= {(image.shape[1], image.shape[0]) for image in decoded}
        batch = pictures(decoded)
        for extractor in extractors:
            rows = extractor.features(batch).float().cpu().numpy()
            _require_finite(rows, names[start : start + len(rows)], extractor.name)
            if extractor.name not in stored:
                place, shape = folder / f"{extractor.name}.npy", (len(names), rows.shape[1])
                stored[extractor.name] = np.lib.format.open_memmap(place, "w+", np.float32, shape)
            stored[extractor.name][start : start + len(rows)] = rows
        report(start + len(decoded), len(names))
    for name, values in stored.items():
        assert isinstance(values, np.memmap)
        values.flush()
        stored[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return Extracted(stored, frozenset(sizes))


def _batches(files: Sequence[Path]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Decoded micro-batches; the next one is decoded while one is looked at."""
    starts = list(range(0, len(files), MICRO_BATCH))
    with ThreadPoolExecutor(max_workers=1) as ahead:
        pending = ahead.submit(_decoded, files[:MICRO_BATCH])
        for start, following in zip(starts, [*starts[1:], len(files)], strict=True):
            decoded = pending.result()
            if following < len(files):
                pending = ahead.submit(_decoded, files[following : following + MICRO_BATCH])
            yield start, decoded


def _decoded(files: Sequence[Path]) -> list[np.ndarray]:
    return [_picture(file) for file in files]


def _picture(file: Path) -> np.ndarray:
    try:
        return images.decode(file.read_bytes())
    except SampleError as error:
        raise UserError(f"{file} is no whole picture ({error}): mend or remove it") from error


def _require_finite(rows: np.ndarray, names: Sequence[str], extractor: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise UserError(
            f"{extractor} gives NaN or infinity for {names[int(bad[0])]}: its weights are damaged or no fit for it"
        )
