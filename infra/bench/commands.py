"""Whole command lines, from the start of a process to the end of the last one below it: `darkroom prepare` beside its peers.

    python infra/bench/commands.py PHOTOS [--pictures 8000] [--embedded 400] [--rounds 3] [--only sharding embedding] [--json result.json]

PHOTOS is a folder of JPEG photographs. `sharding`: a table of addresses, which a server on this machine answers, becomes
shards of 256 px; beside `img2dataset`, two processes each. `embedding`: shards become CLIP embeddings (ViT-B/32, random
weights, batches of 64); beside `clip-retrieval inference`, while `darkroom prepare` writes shards of its own on the way.
All take turns. CPU seconds are those of all processes of a command, also of those that outlived their parent; the server's
are not among them, though it runs on the same cores. The peers are installed once, from the package index, into
environments of their own under infra/bench/.peers; clip-retrieval's has torch from ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from shard import CHECKOUT, HERE, interpreter, photographs
from watched import watched

CLIP_RETRIEVAL = ("clip-retrieval==2.45.0", "setuptools>=77.0.3,<82")
"""Torch wants the one, its clip-anytorch pkg_resources, which later ones have not."""
WORKERS, THREADS, BATCH, WARM_UP = 2, 32, 64, 40

Line = list[str]
Figures = dict[str, float]


@dataclass(frozen=True)
class Race:
    """Command lines that do the same work; the first is ours."""

    title: str
    samples: int
    lines: dict[str, Callable[[Path, int], Line]]
    """Name -> the command line that writes under a folder from that many samples."""
    made: Callable[[Path], int]
    """How many samples a folder has in the end."""


def main() -> None:
    """Makes the inputs, runs what is asked for in turns, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--pictures", type=int, default=8000, help="addresses that become shards")
    parser.add_argument("--embedded", type=int, default=400, help="pictures that are embedded")
    parser.add_argument("--rounds", type=int, default=3, help="how often every command runs")
    parser.add_argument("--only", nargs="+", choices=["sharding", "embedding"], help="what to run")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    wanted, found = options.only or ["sharding", "embedding"], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["PREFECT_HOME"] = str(scratch / "prefect")
        if "sharding" in wanted:
            with server(options.photos, scratch / "served") as port:
                found.append(run(sharding(scratch, port, options.pictures), scratch, options.rounds))
        if "embedding" in wanted:
            found.append(run(embedding(scratch, options.photos, options.embedded), scratch, options.rounds))
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


@contextmanager
def server(photos: Path, folder: Path) -> Iterator[int]:
    """The port of a server of the photographs, in a process of its own."""
    folder.mkdir()
    for path in photographs(photos):
        (folder / path.with_suffix(".jpg").name).symlink_to(path.resolve())
    line = [sys.executable, str(HERE / "http_server.py"), str(folder)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def sharding(scratch: Path, port: int, pictures: int) -> Race:
    """Addresses to shards."""
    peer = interpreter("img2dataset").parent / "img2dataset"

    def listing(count: int) -> str:
        path = scratch / f"{count}.parquet"
        urls = [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(count)]
        pq.write_table(pa.table({"url": urls, "caption": [f"picture {i}" for i in range(count)]}), path)
        return str(path)

    def ours(folder: Path, count: int) -> Line:
        settings = {
            "shard.fetch.allow_private": "true",
            "shard.fetch.concurrency": THREADS,
            "shard.fetch.per_host": THREADS,
            "shard.samples_per_shard": count // (2 * WORKERS),
        }
        return darkroom(listing(count), folder, settings)

    def theirs(folder: Path, count: int) -> Line:
        options = {
            **{"url_list": listing(count), "input_format": "parquet", "url_col": "url", "caption_col": "caption"},
            **{"output_folder": folder, "output_format": "webdataset", "image_size": 256},
            **{"resize_mode": "center_crop", "encode_quality": 95, "compute_hash": "sha256"},
            **{"processes_count": WORKERS, "thread_count": THREADS, "enable_wandb": False},
            "number_sample_per_shard": count // (2 * WORKERS),
        }  # fmt: skip
        return [str(peer), *(f"--{name}={value}" for name, value in options.items())]

    lines = {"darkroom prepare": ours, "img2dataset": theirs}
    return Race("addresses to shards of 256 px", pictures, lines, successes)


def embedding(scratch: Path, photos: Path, pictures: int) -> Race:
    """Shards to embeddings."""
    from embed import make_shards, write_clip

    clip = write_clip("ViT-B-32", scratch / "clip")
    shards = {
        count: make_shards(photos, scratch / f"tars{count}", count, 256)[0] for count in (WARM_UP, pictures)
    }
    peer = clip_retrieval().parent / "clip-retrieval"

    def ours(folder: Path, count: int) -> Line:
        settings = {
            "clip.pretrained": clip,
            "embed.batch_size": BATCH,
            "shard.samples_per_shard": count // 2,
        }
        return darkroom(f"{shards[count]}/{{00000..00001}}.tar", folder, settings)

    def theirs(folder: Path, count: int) -> Line:
        options = {
            **{"input_dataset": f"{shards[count]}/{{00000..00001}}.tar", "input_format": "webdataset"},
            **{"output_folder": folder, "batch_size": BATCH, "num_prepro_workers": WORKERS},
            **{"wds_number_file_per_input_file": count // 2, "output_partition_count": 1},
            "clip_model": f"open_clip:ViT-B-32/{clip}/open_clip_model.safetensors",
        }
        return [str(peer), "inference", *(f"--{name}={value}" for name, value in options.items())]

    lines = {"darkroom prepare": ours, "clip-retrieval inference": theirs}
    return Race("shards to CLIP embeddings", pictures, lines, embedded)


def darkroom(source: str, root: Path, settings: dict[str, Any]) -> Line:
    """`darkroom prepare` with two workers."""
    settings = settings | {"fanout.num_workers": WORKERS}
    options = [f"--set={name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "flows.cli", "prepare", source, f"--root={root}", "--json", *options]


def clip_retrieval() -> Path:
    """The python of an environment with clip-retrieval, made on first use; torch and what else fits are ours."""
    home = HERE / ".peers" / "clip-retrieval"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *CLIP_RETRIEVAL], check=True)
    return python


def run(race: Race, scratch: Path, rounds: int) -> dict[str, Any]:
    """Every command once with few samples, then in turns."""
    for line in race.lines.values():
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            timed(line(Path(out, "out"), WARM_UP))
    runs = []
    for _ in range(rounds):
        figures = {}
        for name, line in race.lines.items():
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                figures[name] = timed(line(Path(out, "out"), race.samples))
                assert race.made(Path(out)) == race.samples, f"{name} lost samples"
        runs.append(figures)
    return {"title": race.title, "samples": race.samples, "runs": runs}


def timed(line: Line) -> Figures:
    """Seconds by the clock until the command ends, and the CPU seconds of all that it started."""
    seconds, seen = watched(line, environment())
    return {"wall_s": seconds, "cpu_s": sum(each.cpu_s for each in seen)}


def environment() -> dict[str, str]:
    """What both get: no download, no colours, no telemetry."""
    return os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }


def successes(folder: Path) -> int:
    """Pictures in the shards below a folder."""
    return sum(json.loads(path.read_text())["successes"] for path in folder.rglob("*_stats.json"))


def embedded(folder: Path) -> int:
    """Image embeddings below a folder."""
    return sum(len(np.load(path, mmap_mode="r")) for path in folder.rglob("img_emb_*.npy"))


def show(found: list[dict[str, Any]]) -> None:
    """One row per command; the ratio is the median of the rounds' ratios."""
    table = Table("what", "command", "samples/s", "samples per CPU second", "ours over it: wall", "CPU")
    for race in found:
        ours = next(iter(race["runs"][0]))
        for name in race["runs"][0]:
            wall = median(race["samples"] / each[name]["wall_s"] for each in race["runs"])
            cpu = median(race["samples"] / each[name]["cpu_s"] for each in race["runs"])
            ratios = [
                median(each[name][kind] / each[ours][kind] for each in race["runs"])
                for kind in ("wall_s", "cpu_s")
            ]
            table.add_row(race["title"], name, f"{wall:,.1f}", f"{cpu:,.1f}", *(f"{r:.2f}" for r in ratios))
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
