"""How fast sharding is, beside img2dataset, webdataset and a bare loop of the same calls.

    python infra/bench/shard.py PHOTOS [--rounds 3] [--only photographs ...] [--json result.json]

PHOTOS is a folder of JPEG photographs. Every contender runs in a process of its own, in turn (A B C A B C ...), and the
figures are medians of CPU time per sample, all threads counted, so that a rate is per core; a ratio is the median of the
ratios round by round. img2dataset is installed once, from the package index, into an environment of its own under
infra/bench/.peers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import contenders
from PIL import Image
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
PEERS = {"img2dataset": "img2dataset==1.47.0"}


@dataclass(frozen=True)
class Race:
    """Contenders on the same input; the first is ours, and its speed over each other's should reach the target."""

    title: str
    folder: str
    count: int
    names: tuple[str, ...]
    targets: tuple[float, ...]


RACES = {
    "photographs": Race("photographs to 256 px", "photographs", 1500, ("darkroom", "img2dataset"), (1.5,)),
    "large": Race("12-megapixel photographs", "large", 60, ("darkroom", "img2dataset"), (2.0,)),
    "whole": Race("photographs, whole shard", "photographs", 1500, ("darkroom", "bare"), (0.9,)),
    "bare": Race("photographs, no shard", "photographs", 1500, ("prepare", "bare"), (0.9,)),
    "bare_large": Race("12 megapixels, no shard", "large", 60, ("prepare", "bare"), (0.9,)),
    "tar": Race("tar writing", "small", 5000, ("tar_darkroom", "tar_webdataset", "tar_digests"), (3.0, 0)),
    "columns": Race("column reading", "column", 4096, ("column_darkroom", "column_webdataset"), (20.0,)),
}
PASSTHROUGHS = {
    "passthrough of 256 px, q95": "same95",
    "passthrough of 256 px, q75": "same75",
    "passthrough of 64 px": "small",
}
LINEARITY = (1_000, 10_000, 100_000)


def main() -> None:
    """Makes the inputs, runs what is asked for, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--rounds", type=int, default=3, help="how often every contender runs")
    parser.add_argument("--only", nargs="+", choices=[*RACES, "passthrough", "linearity"], help="what to run")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    wanted = options.only or [*RACES, "passthrough", "linearity"]
    with tempfile.TemporaryDirectory() as scratch:
        make_inputs(options.photos, Path(scratch), wanted)
        found = [race(RACES[name], Path(scratch), options.rounds) for name in wanted if name in RACES]
        if "passthrough" in wanted:
            found += passthroughs(Path(scratch), options.rounds)
        if "linearity" in wanted:
            found += [linearity(Path(scratch))]
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def make_inputs(photos: Path, scratch: Path, wanted: list[str]) -> None:
    """Photographs, mosaics of 12 megapixels, pictures that need no change, and a column, each in its folder."""
    from data.images import ImageRules, prepare

    for name in ("photographs", "large", "same95", "same75", "small", "column"):
        (scratch / name).mkdir()
    originals = photographs(photos)
    sizes = {"same95": (256, 95), "same75": (256, 75), "small": (64, 95)}
    for number, path in enumerate(originals):
        payload = path.read_bytes()
        (scratch / "photographs" / f"{number:04d}.jpg").write_bytes(payload)
        for name, (side, quality) in sizes.items():
            same = prepare(payload, ImageRules(image_size=side, encode_quality=quality)).payload
            (scratch / name / f"{number:04d}.jpg").write_bytes(same)
    if any("large" in name for name in wanted):
        for number in range(6):
            tiles = [originals[(4 * number + k) % len(originals)] for k in range(4)]
            (scratch / "large" / f"{number:04d}.jpg").write_bytes(mosaic(tiles))
    if "columns" in wanted:
        contenders.write_column(scratch / "column", RACES["columns"].count)


def photographs(folder: Path) -> list[Path]:
    """The JPEGs of `folder`, by name; ends the program where there are none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg"))
    return found or sys.exit(
        f"{folder} holds no .jpg or .jpeg: name the folder of the photographs themselves"
    )


def mosaic(tiles: list[Path]) -> bytes:
    """4000 x 3000 pixels, quality 90, 4:2:0: four photographs, each enlarged to 1000 x 750, four times."""
    whole = Image.new("RGB", (4000, 3000))
    for place in range(16):
        with Image.open(tiles[place % 4]) as tile:
            enlarged = tile.convert("RGB").resize((1000, 750), Image.Resampling.BICUBIC)
        whole.paste(enlarged, (place % 4 * 1000, place // 4 * 750))
    buffer = io.BytesIO()
    whole.save(buffer, "JPEG", quality=90, subsampling=2)
    return buffer.getvalue()


def race(race: Race, scratch: Path, rounds: int) -> dict[str, Any]:
    """Median CPU time of each contender, and ours against each of the others."""
    runs = [
        {name: run(name, scratch / race.folder, race.count) for name in race.names} for _ in range(rounds)
    ]
    first, *others = race.names
    ratios = {o: median(r[o]["cpu_s"] / r[first]["cpu_s"] for r in runs) for o in others}
    return {"title": race.title, "rates": rates(runs), "ratios": ratios, "targets": dict(zip(others, race.targets, strict=True)), "runs": runs}  # fmt: skip


def passthroughs(scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Pictures per second that pass through unchanged, once known to be whole."""
    found = []
    for title, folder in PASSTHROUGHS.items():
        runs = [{"passthrough": run("passthrough", scratch / folder, 4000)} for _ in range(rounds)]
        found.append({"title": title, "rates": rates(runs), "ratios": {}, "targets": {}, "runs": runs})
    return found


def linearity(scratch: Path) -> dict[str, Any]:
    """Time per sample and peak memory of writing more and more small pictures."""
    runs = {count: run("darkroom", scratch / "small", count) for count in LINEARITY}
    growth = (runs[LINEARITY[-1]]["cpu_s"] / LINEARITY[-1]) / (runs[LINEARITY[0]]["cpu_s"] / LINEARITY[0])
    named = {
        f"{count:,} samples": {"per_s": count / r["cpu_s"], "peak_mb": r["peak_mb"]}
        for count, r in runs.items()
    }
    return {"title": "linearity", "rates": named, "ratios": {"time per sample, most over fewest": growth}, "targets": {}, "runs": [runs]}  # fmt: skip


def rates(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median samples per CPU second, and median peak memory, of each contender."""
    return {
        name: {
            "per_s": median(r[name]["count"] / r[name]["cpu_s"] for r in runs),
            "peak_mb": median(r[name]["peak_mb"] for r in runs),
        }
        for name in runs[0]
    }


def run(name: str, folder: Path, count: int) -> dict[str, Any]:
    """One contender in a process of its own, with one thread for every library that listens."""
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "OMP_NUM_THREADS": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",
    }
    command = [str(interpreter(name)), str(HERE / "contenders.py"), name, str(folder), str(count)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def interpreter(name: str) -> Path:
    """The python that has the contender; a peer's environment is made on first use."""
    if name not in PEERS:
        return Path(sys.executable)
    home = HERE / ".peers" / name
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEERS[name]], check=True)
    return python


def show(found: list[dict[str, Any]]) -> None:
    """One row per contender."""
    table = Table("what", "contender", "samples/s per core", "peak MB", "ours over it", "target")
    for item in found:
        for name, figures in item["rates"].items():
            ratio, target = item["ratios"].get(name), item["targets"].get(name)
            table.add_row(
                item["title"],
                name,
                f"{figures['per_s']:,.0f}",
                f"{figures['peak_mb']:,.0f}",
                f"{ratio:.2f}" if ratio else "",
                f"{target:g}" if target else "",
            )
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
