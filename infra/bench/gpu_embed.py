"""How fast CLIP embedding is on one GPU: ViT-L/14 with random weights, the stage's own work beside a bare loop.

    python infra/bench/gpu_embed.py [--samples 8192] [--batch-size 256] [--precision bf16] [--photos DIR] [--json result.json]

The work and the bare loop are those of embed.py beside this file. Prints a row for RESULTS.md. `--tiny` shrinks everything
so that a CPU runs it in seconds: it shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import embed
import torch
from rich.console import Console

from stages.embed import EmbedConfig

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def main() -> None:
    """Runs one race and prints its row."""
    options = arguments(__doc__ or "", samples=8192, batch_size=256)
    name, size = (TINY_CLIP, 32) if options.tiny else ("ViT-L-14", 256)
    with tempfile.TemporaryDirectory() as scratch:
        shards = embed.make_shards(options.photos, Path(scratch, "data"), options.samples, size)
        clip = embed.write_clip(name, Path(scratch, "clip"))
        config = EmbedConfig(
            batch_size=options.batch_size,
            precision=options.precision,
            decode_threads=options.decode_threads,
        )
        what = f"embed, {'tiny' if options.tiny else 'ViT-L/14'}, {options.precision}, batch {options.batch_size}"
        report([embed.race(what, *embed.embed_race(clip, shards, config), options)], options)


def arguments(description: str, *, samples: int, batch_size: int) -> argparse.Namespace:
    """The options that both GPU scripts have; `--tiny` replaces the sizes. Ends the script where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=samples, help="pictures per round, in two shards")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="samples per forward pass")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--decode-threads", type=int, help="threads that decode; default: the stage's own")
    parser.add_argument("--rounds", type=int, default=5, help="how often both run")
    parser.add_argument("--photos", type=Path, help="folder of photographs; default: drawn pictures")
    parser.add_argument("--tiny", action="store_true", help="a smoke test for machines without a GPU")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    if options.tiny:
        options.samples, options.batch_size, options.rounds = 12, 4, 1
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs a smoke test without one")
    return options


def report(found: list[embed.Figures], options: argparse.Namespace) -> None:
    """The table, a row per race for RESULTS.md, and the JSON."""
    embed.show(found)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for f in found:
        row = (
            name,
            torch.__version__,
            f.what,
            f"{f.ours_per_s:,.0f}",
            f"{f.bare_per_s:,.0f}",
            f"{f.ratio:.3f}",
        )
        Console().print("| " + " | ".join(row) + " |", soft_wrap=True)
    if options.json:
        facts: dict[str, Any] = {"device": name, "torch": torch.__version__}
        options.json.write_text(json.dumps([facts | asdict(figures) for figures in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
