"""The pictures of a run's report, read from its snapshots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data import columns, storage
from data.loader import ColumnSet
from data.manifest import Snapshot
from stages.contract import Inputs
from stages.pictures import png
from stages.prompts import read_prompts
from stages.report_data import Generated, Interpolation, Picture, Reconstruction, Variation
from training.metrics.reconstruction import psnr

GRID, RECONSTRUCTED = 48, 8


def reconstructions(inputs: Inputs, data: ColumnSet) -> tuple[Reconstruction, ...]:
    """Some originals beside what the VAE made of them, spread evenly over those that were measured."""
    evaluate = inputs["evaluate"]
    shards = [s for s in evaluate.shards if any(f.path.startswith("reconstructed/") for f in s.files)]
    decoded = np.concatenate([columns.open_array(evaluate.folder, "reconstructed", s.index) for s in shards])
    rows = np.linspace(0, len(data) - 1, len(decoded)).round().astype(int)
    chosen = np.linspace(0, len(decoded) - 1, min(RECONSTRUCTED, len(decoded))).round().astype(int)
    originals, copies, captions = (
        data.rows("image", rows[chosen]),
        decoded[chosen],
        data.captions(rows[chosen]),
    )
    decibels = psnr(originals, copies).per_image
    return tuple(
        Reconstruction(original=png(a), decoded=png(b), caption=c, psnr=float(d))
        for a, b, c, d in zip(originals, copies, captions, decibels, strict=True)
    )


def drawn_in_training(folder: str) -> Iterable[Picture]:
    """The first, the middle and the last of the pictures that a training left."""
    kept = storage.join(folder, "_meta", "samples")
    names = [name for name in storage.list_files(kept) if name.endswith(".png")]
    for at in sorted({0, len(names) // 2, len(names) - 1}) if names else ():
        step = int(names[at].removeprefix("step_").removesuffix(".png"))
        yield Picture(png=storage.read_bytes(storage.join(kept, names[at])), caption=f"step {step:,}")


def generated(snapshot: Snapshot, correct: Sequence[bool | None]) -> tuple[Generated, ...]:
    """The first generated images with their prompts; `correct` says of each whether the recogniser found the prompt in it."""
    prompts = read_prompts(snapshot.folder)[:GRID]
    images: list[np.ndarray] = []
    for shard in snapshot.shards:
        if len(images) < GRID:
            images.extend(columns.open_array(snapshot.folder, "generated", shard.index))
    return tuple(
        Generated(png=png(np.array(image)), prompt=prompt.text, correct=right, heldout=prompt.heldout)
        for image, prompt, right in zip(images, prompts, correct, strict=False)
    )


def _gallery(snapshot: Snapshot, kind: str) -> Iterable[tuple[str, list[bytes]]]:
    """(caption, PNGs in order) of every group of the gallery's `kind`."""
    lines = storage.read_bytes(storage.join(snapshot.folder, "gallery/gallery.jsonl")).splitlines()
    groups: dict[int, list[dict[str, Any]]] = {}
    for item in map(json.loads, lines):
        if item["kind"] == kind:
            groups.setdefault(item["group"], []).append(item)
    for items in groups.values():
        names = [item["file"] for item in sorted(items, key=lambda item: item["position"])]
        yield (
            items[0]["caption"],
            [storage.read_bytes(storage.join(snapshot.folder, "gallery", n)) for n in names],
        )


def variations(snapshot: Snapshot) -> tuple[Variation, ...]:
    """Pictures of the dataset, each with those that its embedding alone gave."""
    return tuple(
        Variation(original=pictures[0], variations=tuple(pictures[1:]), caption=caption)
        for caption, pictures in _gallery(snapshot, "variation")
    )


def interpolations(snapshot: Snapshot) -> tuple[Interpolation, ...]:
    """Strips from one picture's embedding to another's."""
    found = []
    for caption, pictures in _gallery(snapshot, "interpolation"):
        start, end = caption.split(" → ", 1)
        found.append(Interpolation(frames=tuple(pictures), start=start, end=end))
    return tuple(found)
