"""A folder of pictures -> features on disk, in fixed micro-batches; memory does not grow with the number of pictures.

Legend: N pictures, D feature width.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import images, storage
from data.errors import SampleError, UserError
from data.folders import is_image
from data.image_rules import ImageRules
from training.metrics.extractors import MICRO_BATCH, Extractor, pictures

log = logging.getLogger("darkroom.score")

BLOCK = 64
"""Rows after which it is told on disk how far extraction has come; a multiple of MICRO_BATCH, so that a batch is never parted."""

LIMITS = ImageRules(max_pixels=2**28, max_bytes=2**30, max_aspect_ratio=200.0)
"""What a picture's header may announce. A file of a megabyte can hold gigabytes of one colour, and what makes a strip's shorter side
as long as a network's makes the longer one longer than memory."""

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
    """The picture files anywhere under `folder`, sorted by relative path.

    Raises UserError for fewer than two, and for what would be left out in silence: a picture's name that leads to no file, a link to
    a folder, and a folder that cannot be read.
    """
    root = Path(folder)
    files = sorted(path for path in _named(root) if is_image(path.name))
    if not any(root.iterdir()):
        raise UserError(f"{folder} is empty: give a folder of pictures")
    if not files:
        raise UserError(f"{folder} has no pictures (.png, .jpg, .webp …): give a folder of pictures")
    if odd := [path for path in files if not path.is_file()]:
        raise UserError(f"{odd[0]} is no file, or a link that leads to none: mend or remove it")
    if len(files) == 1:
        raise UserError(
            f"{folder} has one picture, {files[0].name}: a distribution needs many, and two at least"
        )
    return files


def _named(root: Path) -> Iterator[Path]:
    """Whatever lies under `root` and is no folder."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable") from error

    for place, folders, names in os.walk(root, onerror=refuse):
        for name in folders:
            if (link := Path(place, name)).is_symlink():
                raise UserError(
                    f"{link} is a link to a folder, which would not be followed: put its pictures there, or remove it"
                )
        yield from (Path(place, name) for name in names)


def extract(
    files: Sequence[Path], extractors: Sequence[Extractor], folder: Path, report: Progress = lambda *_: None
) -> Extracted:
    """Features of `files` by every extractor, kept as .npy files in `folder`; each picture is decoded once.

    What an earlier call for the same pictures left in `folder` is taken up where it stopped. Raises UserError naming a file
    that is no whole picture, or whose features are not finite.
    """
    return _extract(lambda first: _batches(files, first), list(map(str, files)), extractors, folder, report)


def extract_arrays(
    images: np.ndarray, extractors: Sequence[Extractor], folder: Path, report: Progress = lambda *_: None
) -> Extracted:
    """As `extract`, of pictures (N, H, W, 3) uint8."""

    def batches(first: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        for at in range(first, len(images), MICRO_BATCH):
            yield at, list(images[at : at + MICRO_BATCH])

    names = [f"picture {number}" for number in range(len(images))]
    return _extract(batches, names, extractors, folder, report)


def _extract(
    batches: Callable[[int], Iterator[tuple[int, list[np.ndarray]]]],
    names: Sequence[str],
    extractors: Sequence[Extractor],
    folder: Path,
    report: Progress,
) -> Extracted:
    """`batches` gives micro-batches from a row on, with their first rows."""
    with _alone(folder):
        kept = [_Kept.found(folder, extractor, len(names)) for extractor in extractors]
        sizes = {size for each in kept for size in each.sizes}
        first = min(each.done for each in kept)
        for start, decoded in batches(first) if first < len(names) else ():
            sizes |= {(image.shape[1], image.shape[0]) for image in decoded}
            batch = pictures(decoded)
            for each in kept:
                if start >= each.done:
                    rows = each.extractor.features(batch).float().cpu().numpy()
                    _require_finite(rows, names[start : start + len(rows)], each.extractor.name)
                    each.add(start, rows, sizes)
            report(start + len(decoded), len(names))
        return Extracted({each.extractor.name: each.values() for each in kept}, frozenset(sizes))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Others who extract into `folder` wait until this ends, however it ends; where nothing can be written, nobody does.

    Raises UserError for what the disk refuses.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock = held.enter_context((folder / ".lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.warning("another process extracts into %s: waiting for it", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        except OSError as error:
            raise UserError(
                f"features cannot be kept in {folder} ({error}): give another place with --features, or make room"
            ) from error


@dataclass
class _Kept:
    """Features of one extractor on disk: a .npy of all N rows, and beside it how many of them are there and their SHA-256."""

    extractor: Extractor
    path: Path
    count: int
    """N"""
    done: int = 0
    sizes: frozenset[tuple[int, int]] = frozenset()
    rows: np.memmap | None = None
    digest: Any = field(default_factory=hashlib.sha256)
    """Of the rows that are there."""

    @classmethod
    def found(cls, folder: Path, extractor: Extractor, count: int) -> _Kept:
        """What `folder` holds; nothing where that is no whole array of N rows, or the rows said to be there are not those that were written."""
        kept = cls(extractor, folder / f"{extractor.name}-{extractor.digest[:12]}.npy", count)
        try:
            # not opened for writing: numpy would fill a file that was cut with zeros
            there = np.load(kept.path, mmap_mode="r", allow_pickle=False)
            told = json.loads(kept.told.read_text())
            sizes = frozenset((int(w), int(h)) for w, h in told["sizes"])
            done = int(told["rows"])
            sha256 = str(told["sha256"])
        except (OSError, ValueError, EOFError, KeyError, TypeError, OverflowError, RecursionError):
            return kept
        if there.ndim == 2 and len(there) == count and there.dtype == np.float32 and 0 <= done <= count:
            digest = hashlib.sha256(there[:done])
            if digest.hexdigest() == sha256:
                kept.done, kept.sizes, kept.digest = done, sizes, digest
        return kept

    @property
    def told(self) -> Path:
        """The file that says how many rows are there."""
        return self.path.with_suffix(".json")

    def add(self, start: int, rows: np.ndarray, sizes: Iterable[tuple[int, int]]) -> None:
        """Writes `rows` (B, D) from row `start` on; what is there is told once a block, after the rows themselves."""
        end = start + len(rows)
        if self.rows is None:
            self.rows = self._opened(rows.shape[1])
        self.rows[start:end] = rows
        self.digest.update(rows)
        if end % BLOCK == 0 or end == self.count:
            self.rows.flush()
            told = {"rows": end, "sha256": self.digest.hexdigest(), "sizes": sorted(sizes)}
            storage.write_bytes(str(self.told), json.dumps(told).encode())
            self.done = end

    def _opened(self, width: int) -> np.memmap:
        if self.done:
            return np.lib.format.open_memmap(self.path, "r+")
        self.told.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(self.path, "w+", np.float32, (self.count, width))
        if hasattr(
            os, "posix_fallocate"
        ):  # a full disk is an error now, and would be a fault of memory later
            with self.path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, self.path.stat().st_size)
        return rows

    def values(self) -> np.ndarray:
        """(N, D) float32, a read-only memory map."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


def _batches(files: Sequence[Path], first: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Decoded micro-batches from row `first` on; the next one is decoded while one is looked at."""
    starts = list(range(first, len(files), MICRO_BATCH))
    with ThreadPoolExecutor(max_workers=1) as ahead:
        pending = ahead.submit(_decoded, files[first : first + MICRO_BATCH])
        for start, following in zip(starts, [*starts[1:], len(files)], strict=True):
            decoded = pending.result()
            if following < len(files):
                pending = ahead.submit(_decoded, files[following : following + MICRO_BATCH])
            yield start, decoded


def _decoded(files: Sequence[Path]) -> list[np.ndarray]:
    return [_picture(file) for file in files]


def _picture(file: Path) -> np.ndarray:
    try:
        payload = file.read_bytes()
        images.admit(payload, LIMITS)
        return images.decode(payload)
    except SampleError as error:
        if error.reason in ("too_many_pixels", "too_many_bytes", "aspect_ratio"):
            raise UserError(f"{file} is no picture to be scored ({error}): remove it") from error
        raise UserError(f"{file} is no whole picture ({error}): mend or remove it") from error
    except OSError as error:
        raise UserError(f"{file} is no whole picture ({error}): mend or remove it") from error


def _require_finite(rows: np.ndarray, names: Sequence[str], extractor: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise UserError(
            f"{extractor} gives NaN or infinity for {names[int(bad[0])]}: its weights are damaged or no fit for it"
        )
