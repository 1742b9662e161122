"""How fast pictures become features on one GPU: the evaluation's own extractors with random weights, no Ray, no files.

    python infra/bench/gpu_score.py [--only inception dinov2 clip] [--images 2048] [--side 256] [--json result.json]

    inception   FID's Inception, tf1 resize, fp32
    dinov2      DINOv2 ViT-L/14 at 224 px, fp32
    clip        CLIP ViT-L/14 at 224 px, fp32

Resizing is counted, decoding is not; pictures go in the fixed micro-batches of an evaluation. A figure is the median over
rounds. Prints rows for RESULTS.md. `--tiny` shrinks CLIP, DINOv2 and the number of pictures so that a CPU runs it in
seconds: it shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import embed
import numpy as np
import torch
from gpu_embed import TINY_CLIP
from rich.console import Console
from rich.table import Table

from training.metrics import extractors
from training.metrics.inception_network import build_inception


@dataclass(frozen=True)
class Figures:
    """One extractor's speed."""

    what: str
    device: str
    torch: str
    images_per_s: float
    rounds: tuple[float, ...]
    """Images per second of each."""
    width: int
    peak_gib: float | None


def inception(folder: Path, tiny: bool) -> Path:  # noqa: ARG001
    """FID's network has one size."""
    torch.save(build_inception().state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


def dinov2(folder: Path, tiny: bool) -> Path:
    """ViT-L/14, or one layer of width 16."""
    from transformers import Dinov2Config, Dinov2Model

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    Dinov2Model(Dinov2Config(patch_size=14, **(small if tiny else large))).save_pretrained(folder / "dinov2")
    return folder / "dinov2"


def clip(folder: Path, tiny: bool) -> Path:
    """ViT-L/14, or one layer of width 32."""
    return Path(embed.write_clip(TINY_CLIP if tiny else "ViT-L-14", folder / "clip"))


NETWORKS: dict[str, tuple[str, Callable[[Path, bool], Path]]] = {
    "inception": ("FID Inception, tf1", inception),
    "dinov2": ("DINOv2 ViT-L/14", dinov2),
    "clip": ("CLIP ViT-L/14", clip),
}


def measured(name: str, options: argparse.Namespace) -> Figures:
    """Rounds over the same pictures, after one micro-batch to warm up."""
    what, write = NETWORKS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        weights = str(write(Path(scratch), options.tiny))
        extractor = extractors.load(name, weights, is_custom=name == "inception")
    rng, on_gpu = np.random.default_rng(0), torch.cuda.is_available()
    shape = (options.images, options.side, options.side, 3)
    pictures = extractors.pictures(list(rng.integers(0, 256, shape, dtype=np.uint8)))
    size = extractors.MICRO_BATCH
    width = extractor.features(pictures[:size]).shape[1]
    rates = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        rows = [extractor.features(pictures[at : at + size]) for at in range(0, len(pictures), size)]
        torch.cat(rows).cpu()
        rates.append(len(pictures) / (time.perf_counter() - started))
    return Figures(
        what=f"{'tiny: ' if options.tiny else ''}{what}, {options.side} px in",
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        torch=torch.__version__.split("+")[0],
        images_per_s=median(rates),
        rounds=tuple(rates),
        width=width,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    )


def main() -> None:
    """Measures the extractors and prints their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=2048, help="pictures per round")
    parser.add_argument("--side", type=int, default=256, help="their width and height")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a smoke test for machines without a GPU")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    if options.tiny:
        options.images, options.side, options.rounds = 4, 32, 1
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny shows on a CPU that the script works")
    found = [measured(name, options) for name in options.only]
    table = Table("GPU", "torch", "what", "images/s", "width", "peak GiB")
    for f in found:
        memory = "" if f.peak_gib is None else f"{f.peak_gib:.1f}"
        table.add_row(f.device, f.torch, f.what, f"{f.images_per_s:,.0f}", str(f.width), memory)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
