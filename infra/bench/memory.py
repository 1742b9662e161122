"""What `darkroom prepare` holds in memory as its source grows: the peak of the command and of each kind of process below it.

    python infra/bench/memory.py [--rows 1000 10000 100000] [--json memory.json]

The source is a Parquet file of small pictures, all in its cells; shards have 1,000 rows, and there are two workers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table
from watched import watched

CHECKOUT = Path(__file__).parents[2]
SIDE, PER_SHARD, BATCH = 16, 1000, 10_000
KINDS = {"ray::_Worker": "worker", "flows.cli": "command", "uvicorn": "Prefect's server"}
"""What a command line of each kind of process has in it."""


def main() -> None:
    """Runs each size once, prints a table of peaks and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["PREFECT_HOME"] = str(Path(name, "prefect"))
        for rows in options.rows:
            table = write_source(Path(name, f"{rows}.parquet"), rows)
            found[rows] = peaks(table, Path(name, str(rows)))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def write_source(path: Path, rows: int) -> Path:
    """A Parquet file of pictures of noise; returns its path."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "JPEG")
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, BATCH):
            numbers = range(first, min(first + BATCH, rows))
            images = [buffer.getvalue() + b"%09d" % i for i in numbers]
            captions = [f"a small picture of noise, the one with number {i}" for i in numbers]
            writer.write_table(pa.table({"image": images, "caption": captions}, schema=schema))
    return path


def peaks(source: Path, root: Path) -> dict[str, float]:
    """Kind of process -> the most MiB that one of them held; and the seconds that the command took."""
    settings = {"shard.image_size": SIDE, "shard.samples_per_shard": PER_SHARD, "fanout.num_workers": 2}
    options = [f"--set={name}={value}" for name, value in settings.items()]
    line = [sys.executable, "-m", "flows.cli", "prepare", str(source), f"--root={root}", "--json", *options]
    seconds, seen = watched(line, os.environ | {"PYTHONPATH": str(CHECKOUT)})
    found = {"seconds": seconds}
    for each in seen:
        for kind in (kind for mark, kind in KINDS.items() if mark in each.line):
            found[kind] = max(each.peak_mib, found.get(kind, 0))
    return found


def show(found: dict[int, dict[str, float]]) -> None:
    """One row per size."""
    kinds = ["command", "worker", "Prefect's server"]
    table = Table("rows", *(f"{kind}, MiB" for kind in kinds), "seconds")
    for rows, figures in found.items():
        cells = [f"{figures.get(kind, 0):,.0f}" for kind in kinds]
        table.add_row(f"{rows:,}", *cells, f"{figures['seconds']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
