"""What the loader costs: a training step fed by it beside the same step on one batch in memory, and its own speed.

    OMP_NUM_THREADS=1 python infra/bench/loader.py [--rounds 40] [--threads 1] [--rows 4096] [--only steps speed] [--json result.json]

    steps    the loop's own step of the demo's denoiser and prior, at their batch sizes: fed by the loader as a training
             worker is (`data.loader.batches` behind `data.ahead.prefetch`, shuffled over all shards), over the step on a
             cached batch. Both go in turns, step by step. By the clock a thread reads ahead while the step computes; the
             ratio of CPU time counts what that thread does too.
    speed    samples per second of the loader alone, one thread, no reading ahead, for the columns that the `unclip` recipe's
             prior and denoiser read: embeddings of 768, captions of 5 to 77 tokens of 768, latents of 8 x 32 x 32. Targets
             are what one GPU is to train (`gpu_train.py`). Sets of columns go in turns, batch by batch.

Columns are random values that the columns' own writer stored, in shards of 512; the files lie in the page cache. A figure is a
median, a ratio the median of ratios. `train_step.py` measures what the step itself costs, on a cached batch alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from train_step import in_turns, our_step

from data import columns
from data.ahead import prefetch
from data.columns import write_array, write_ragged
from data.loader import ColumnSet, batches
from data.manifest import ShardRecord, Snapshot, keys_digest
from flows.recipes import demo
from training.systems import denoiser, prior
from training.systems.system import Batch, TrainConfig

PER_SHARD = 512
FEWEST_TOKENS = 5
RECIPE_SHAPES = {"vae_moments": (8, 32, 32), "img_emb": (768,), "text_emb": (768,), "text_hidden": (77, 768)}
SETS = {
    "prior": ("img_emb", "text_emb", "text_hidden"),
    "denoiser": ("vae_moments", "img_emb", "text_hidden"),
    "embeddings": ("img_emb", "text_emb"),
    "latents": ("vae_moments",),
}
"""What is read together."""
BATCH = 256
TARGETS = {
    "wall_ratio": "≤ 1.05",
    "cpu_ratio": "≤ 1.05",
    "prior_per_s": "≥ 2,500",
    "denoiser_per_s": "≥ 110",
}


def write_columns(folder: Path, shapes: Mapping[str, tuple[int, ...]], rows: int) -> ColumnSet:
    """`rows` samples of random columns, stored and opened; one caption is as long as any may be."""
    rng = np.random.default_rng(0)
    records = []
    for index, start in enumerate(range(0, rows, PER_SHARD)):
        count = min(PER_SHARD, rows - start)
        files = [
            file
            for name, shape in shapes.items()
            for file in _written(str(folder), name, index, _values(rng, count, shape), rng)
        ]
        keys = keys_digest(f"{start + i:09d}" for i in range(count))
        records.append(ShardRecord(index=index, samples=count, keys=keys, files=tuple(files)))
    for name in ("text_emb", "text_hidden"):
        path = folder / "empty" / f"{name}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, _values(rng, 1, shapes[name])[0].astype(np.float32))
    return ColumnSet([_snapshot(folder, tuple(shapes), tuple(records))])


def _values(rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal((count, *shape), np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True) if len(shape) == 1 else values


def _written(folder: str, name: str, index: int, values: np.ndarray, rng: np.random.Generator) -> Any:
    if columns.COLUMNS[name].kind == "array":
        return (write_array(folder, name, index, values),)
    lengths = rng.integers(FEWEST_TOKENS, values.shape[1] + 1, len(values))
    lengths[0] = values.shape[1]
    return write_ragged(folder, name, index, [row[:n] for row, n in zip(values, lengths, strict=True)])


def _snapshot(folder: Path, names: tuple[str, ...], records: tuple[ShardRecord, ...]) -> Snapshot:
    return Snapshot(
        stage="columns",
        version=1,
        fingerprint="columns",
        config={},
        columns=names,
        shards=records,
        facts={"scaling_factor": 1.0},
        folder=str(folder),
    )


def steps(options: argparse.Namespace) -> dict[str, float]:
    """The demo's denoiser and prior, each fed by the loader over the same on a cached batch."""
    recipe = demo()
    channels, side = recipe.vae.latent_channels, recipe.shard.image_size // 4
    shapes = {
        "vae_moments": (2 * channels, side, side),
        "img_emb": (recipe.clip.embed_dim,),
        "text_emb": (recipe.clip.embed_dim,),
        "text_hidden": (recipe.clip.context_length, recipe.clip.text_width),
    }
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_columns(Path(folder), shapes, options.rows)
        trained = {
            "denoiser": (denoiser.fit(recipe.denoiser, dataset), recipe.denoiser),
            "prior": (prior.fit(recipe.prior, dataset), recipe.prior),
        }
        found = {}
        for name, (trainable, config) in trained.items():
            figures = step_race(trainable, config, dataset, options.rounds)
            found |= {f"{name} {figure}": value for figure, value in figures.items()}
    return found


def step_race(trainable: Any, config: TrainConfig, dataset: ColumnSet, rounds: int) -> dict[str, float]:
    """Two equal trainings in turns, of which one gets another batch in every step."""
    stream = prefetch(_stream(dataset, trainable.columns, config.batch_size))
    batch = next(stream)
    cached, _ = our_step(trainable, config, dict(batch))
    fed, _ = our_step(trainable, config, batch)

    def loaded() -> None:
        batch.update(next(stream))
        fed()

    pairs = in_turns([loaded, cached], rounds)
    return {
        "loaded_ms": 1e3 * median(p[0][0] for p in pairs),
        "cached_ms": 1e3 * median(p[1][0] for p in pairs),
        "wall_ratio": median(p[0][0] / p[1][0] for p in pairs),
        "cpu_ratio": median(p[0][1] / p[1][1] for p in pairs),
    }


def speed(options: argparse.Namespace) -> dict[str, float]:
    """Samples per second of the loader alone, for every set of columns."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_columns(Path(folder), RECIPE_SHAPES, options.rows)
        streams = {name: _stream(dataset, names, BATCH) for name, names in SETS.items()}
        epoch = -(-options.rows // BATCH)
        for stream in streams.values():  # opens every shard and brings its pages in
            _take(stream, epoch)
        works: list[Callable[[], None]] = [partial(_take, stream, 1) for stream in streams.values()]
        pairs = in_turns(works, options.rounds)
    return {
        f"{name}_per_s": BATCH / median(round_[i][0] for round_ in pairs) for i, name in enumerate(streams)
    }


def _stream(dataset: ColumnSet, names: tuple[str, ...], batch_size: int) -> Iterator[Batch]:
    return batches(dataset, names, seed=0, batch_size=batch_size)


def _take(stream: Iterator[Batch], count: int) -> None:
    for _ in islice(stream, count):
        pass


RACES = {"steps": steps, "speed": speed}


def main() -> None:
    """Runs what is asked for, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="how often everything runs")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rows", type=int, default=4096, help="samples of the dataset")
    parser.add_argument("--only", nargs="+", choices=list(RACES), default=list(RACES))
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: RACES[name](options) for name in options.only}
    table = Table("what", "figure", "median", "target")
    for name, figures in found.items():
        for figure, value in figures.items():
            table.add_row(name, figure, f"{value:,.4g}", TARGETS.get(figure.split(" ")[-1], ""))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
