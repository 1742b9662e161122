"""What an evaluation's statistics cost beside looking at the pictures, and neighbours of many samples: time and memory.

    OMP_NUM_THREADS=2 python infra/bench/evaluation.py [--pictures 128] [--rows 8192] [--neighbours 50000] [--json result.json]

Extraction is FID's Inception with random weights on pictures of 256 px, resizing counted and decoding not. Accumulation is the
moments of all rows in their blocks of 256, merged; the jackknife's is a second pass over its 16 blocks. Both are given per
picture. `--neighbours N` measures precision, recall, density and coverage of N by N samples of width 2048; 0 leaves it out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from training.metrics.inception import WIDTH, features, load_inception
from training.metrics.inception_network import build_inception
from training.metrics.intervals import index_blocks
from training.metrics.moments import accumulate_here, merge, runs
from training.metrics.neighbours import neighbours

ROUNDS = 3


def main() -> None:
    """Measures in turns and prints a line for each part, with its share of extraction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("pictures", 128), ("rows", 8192), ("neighbours", 50_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    found: dict[str, Any] = per_picture(options.pictures, options.rows)
    for what, ms in found.items():
        Console().print(f"{what:<14} {ms:9.3f} ms a picture   {ms / found['extraction']:.2%} of extraction")
    if options.neighbours:
        seconds, gib = of_neighbours(options.neighbours)
        found |= {"neighbours_s": seconds, "neighbours_gib": gib}
        Console().print(
            f"neighbours of {options.neighbours:,} by as many: {seconds:.0f} s, {gib:.2f} GiB beside the samples"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def per_picture(pictures: int, rows: int) -> dict[str, float]:
    """Milliseconds a picture of extraction, accumulation and the jackknife's accumulation, medians of rounds in turns."""
    network, generator = network_of_random_weights(), torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (pictures, 3, 256, 256), dtype=torch.uint8, generator=generator)
    looked = np.random.default_rng(0).standard_normal((rows, WIDTH), np.float32)
    spans = [(int(block[0]), int(block[-1]) + 1) for block in index_blocks(rows, 16)]
    features(network, images[:16])
    work: dict[str, tuple[Callable[[], object], int]] = {
        "extraction": (lambda: features(network, images), pictures),
        "accumulation": (lambda: merge(accumulate_here(looked, runs(rows))), rows),
        "jackknife": (lambda: list(accumulate_here(looked, spans)), rows),
    }
    rounds = [{name: timed(call) / count for name, (call, count) in work.items()} for _ in range(ROUNDS)]
    return {name: 1000 * float(np.median([each[name] for each in rounds])) for name in work}


def of_neighbours(count: int) -> tuple[float, float]:
    """Seconds of `count` by `count` samples of width 2048, and the most GiB that were held beside the mapped samples."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        real, fake = (stored(Path(folder) / name, rng, count) for name in ("real.npy", "fake.npy"))
        tracemalloc.start()
        seconds = timed(lambda: neighbours(real, fake))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return seconds, peak / 2**30


def stored(path: Path, rng: np.random.Generator, count: int) -> np.ndarray:
    """A read-only memory map of `count` rows of noise."""
    values = np.lib.format.open_memmap(path, "w+", np.float32, (count, WIDTH))
    for start in range(0, count, 4096):
        values[start : start + 4096] = rng.standard_normal((min(4096, count - start), WIDTH), np.float32)
    values.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def network_of_random_weights() -> nn.Module:
    """FID's Inception as an evaluation loads it."""
    torch.manual_seed(0)
    model = build_inception()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(model.state_dict(), file.name)
        return load_inception(file.name, None)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
