"""Our training beside the peers' own training scripts: samples per second of the same network on the same pictures.

    python infra/bench/train_peers.py [PHOTOS] [--rounds 3] [--steps 6] [--threads 2] [--only prior decoder text dalle2] \\
        [--diffusers DIR] [--dalle2 DIR] [--tiny] [--json result.json]

    prior      diffusers' train_text_to_image_prior.py (Kandinsky 2.2): a PriorTransformer; ours is the system `prior`
    decoder    diffusers' train_text_to_image_decoder.py (Kandinsky 2.2): a U-Net given an image embedding
    text       diffusers' train_text_to_image.py (Stable Diffusion 1): a U-Net given text
    dalle2     DALLE2-pytorch's train_diffusion_prior.py, which stores image embeddings and encodes captions in every step

The scripts run unchanged, from a checkout of a pinned commit. They encode every batch; ours reads columns that our stages
stored once, and `stored_after_epochs` says how many epochs pay for that. Network, batch size, pictures (JPEGs of the size
that the networks take, so that nobody is slowed by large ones), float32, AdamW, weight decay, clipping, moving average and
threads are the same, and so is the environment; the peers keep their defaults else, which load data in the training process.

Nobody could train the published sizes here, so widths, layers and the sides of pictures are divided, of the encoders as of
the network: `prior` has its widths and layers over 4, `decoder` and `text` their widths and sides over 2, `dalle2` is as
published. What decides the ratio is the encoders' share, so it is counted: floating-point operations of encoding over
those of the network's forward and backward pass, here and at the published sizes with the scripts' default resolution.
About the most that not encoding can bring is 1 + share. One caption has all 77 tokens, as in any large set, so that ours
pads to what the peers pad to. In `prior` ours is the engine's own system. The other networks are conditioned otherwise than
our recipes' are, so there our loop trains the peer's network by a trainable of `train_networks.py`.

Every contender is a process of its own, peer and ours in turns, the first of a round changing. A step lasts from one
optimizer step to the next, as torch's own hook tells of both sides; the first steps are left out, and with them the start.
A run's step is the median of its steps, a figure the median over the rounds, a ratio the median of the rounds' ratios. The
peers are installed once, from the package index, into an environment under infra/bench/.peers/train that sees ours, so that
both sides have one torch. Wants an idle machine: a thread that loses its core for a moment holds up all others.
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
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from train_inputs import make_inputs
from train_races import RACES, TINY, Race

HERE = Path(__file__).parent
HOME = HERE / ".peers" / "train"
WANTED = (
    "accelerate==1.15.0",
    "clip-anytorch==2.6.0",
    "coca-pytorch==0.1.0",
    "datasets==5.2.0",
    "einops==0.8.2",
    "ema-pytorch==0.8.3",
    "embedding-reader==1.8.1",
    "kornia==0.9.0",
    "pytorch-warmup==0.2.0",
    "resize-right==0.0.2",
    "rotary-embedding-torch==0.9.1",
    "setuptools>=77.0.3,<82",  # torch wants the one; clip-anytorch imports pkg_resources, which later ones have not
    "tensorboard==2.21.0",
    "torchmetrics==1.9.0",
    "vector-quantize-pytorch==1.32.0",
    "x-clip==0.14.4",
)
CHECKOUTS = {
    "diffusers": (
        "https://github.com/huggingface/diffusers",
        "58eb52c0803ea9af3abec60841c2a093bdf1f951",
    ),
    "dalle2": (
        "https://github.com/lucidrains/DALLE2-pytorch",
        "680dfc4d93b70f9ab23c814a22ca18017a738ef6",
    ),
}
TARGETS = {"ratio": "≥ 1.5"}
WARM_UP = 2


def main() -> None:
    """Runs the races, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, nargs="?", help="folder of photographs; without it, drawn ones")
    parser.add_argument("--rounds", type=int, default=3, help="how often both run")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=2, help="threads of both")
    parser.add_argument("--only", nargs="+", choices=list(RACES), default=list(RACES))
    for name, (address, _) in CHECKOUTS.items():
        parser.add_argument(f"--{name}", default=address, help="git repository that has the pinned commit")
    parser.add_argument("--tiny", action="store_true", help="shows in minutes that the script works")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    install()
    for name in {RACES[race].peer for race in options.only}:
        check_out(name, getattr(options, name))
    found = {}
    for name in options.only:
        found[name] = run_race(name, options)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


def install() -> None:
    """Makes the peers' environment, which finds behind its own packages those of ours."""
    python, finished = HOME / "bin" / "python", HOME / "installed"
    if finished.exists():
        return
    venv.create(HOME, with_pip=True)
    (own,) = HOME.glob("lib/python*/site-packages")
    (own / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *WANTED], check=True)
    finished.touch()


def check_out(name: str, source: str) -> Path:
    """The peer's pinned commit as files, fetched from `source` on first use."""
    address, commit = CHECKOUTS[name]
    folder = HOME / f"{name}-{commit[:12]}"
    if (folder / ".git" / "HEAD").is_file() and len(list(folder.iterdir())) > 1:
        return folder
    source = source if "://" in source else str(Path(source).resolve())
    git = ["git", "-C", str(folder)]
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    if subprocess.run([*git, "fetch", "--quiet", "--depth=1", source, commit]).returncode:
        raise SystemExit(
            f"{source} does not give commit {commit}: give --{name} a clone of {address} that has it"
        )
    subprocess.run([*git, "checkout", "--quiet", "FETCH_HEAD"], check=True)
    return folder


def run_race(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peer and ours in turns, and what the sizes come to."""
    race = (TINY if options.tiny else RACES)[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        encoding_s = make_inputs(race, options.photos, folder)
        rounds = []
        for number in range(options.rounds):
            order = ["peer", "ours"][:: 1 if number % 2 else -1]
            rounds.append({who: run(name, who, folder, options) for who in order})
        sizes = run(name, "flops", folder, options)
    return {**figures(race, rounds, encoding_s), **sizes, "rounds": rounds}


def figures(race: Race, rounds: list[dict[str, Any]], encoding_s: float) -> dict[str, Any]:
    """Medians of what the rounds gave."""
    saved = median(r["peer"]["step_s"] - r["ours"]["step_s"] for r in rounds) / race.batch_size
    return {
        "title": race.title,
        "batch_size": race.batch_size,
        "ours_per_s": race.batch_size / median(r["ours"]["step_s"] for r in rounds),
        "peer_per_s": race.batch_size / median(r["peer"]["step_s"] for r in rounds),
        "ratio": median(r["peer"]["step_s"] / r["ours"]["step_s"] for r in rounds),
        "cpu_ratio": median(r["peer"]["step_cpu_s"] / r["ours"]["step_cpu_s"] for r in rounds),
        "stored_after_epochs": encoding_s / saved,
    }


def run(name: str, who: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What one contender's process says."""
    peer = RACES[name].peer
    checkout = check_out(peer, getattr(options, peer))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": str(checkout) if peer == "dalle2" else "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
    }
    script = [str(HOME / "bin" / "python"), str(HERE / "train_contenders.py"), name, who, str(folder)]
    more = [str(WARM_UP), str(options.steps), "--checkout", str(checkout), *["--tiny"] * options.tiny]
    with (folder / f"{who}.log").open("w+") as log:
        done = subprocess.run(
            [*script, *more], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        if done.returncode or not done.stdout:
            log.seek(0)
            raise SystemExit(f"{name}, {who}: {log.read()[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict[str, dict[str, Any]]) -> None:
    """One row per figure, as the docstring names them."""
    table = Table("race", "figure", "median", "target")
    for name, figures in found.items():
        for figure, value in figures.items():
            if isinstance(value, float):
                table.add_row(name, figure, f"{value:,.3f}", TARGETS.get(figure, ""))
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
