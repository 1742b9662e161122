"""What embedding and encoding cost beside a bare loop over the same network, on the CPU.

    python infra/bench/embed.py PHOTOS [--rounds 5] [--samples 48] [--threads 1] [--only embed encode] [--json result.json]

PHOTOS is a folder of photographs; they are sharded first. Ours is the stages' own per-shard work: read, decode, prepare,
run, write. The bare loop runs the same network in the same batches over tensors that lie in memory, decoded and prepared.
Both have the same torch threads and take turns; a figure is the median of the rounds, a ratio the median of the ratios.
Weights are random: CLIP is ViT-B/32, the VAE is Stable Diffusion's, at 64 px.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import sources
from data.manifest import ShardRecord
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from data.tars import ShardReader
from stages.embed import EmbedConfig, Embedding
from stages.encode import EncodeConfig, Encoding
from stages.fanout import ShardTask
from stages.overlap import decoded
from training.pixels import to_unit_range

SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""Stable Diffusion 1's `vae/config.json`, as far as the encoder goes."""
TARGET = 0.95


@dataclass(frozen=True)
class Figures:
    """One race; speeds are medians over the rounds."""

    what: str
    ours_per_s: float
    bare_per_s: float
    ratio: float
    """Ours over bare by the clock: the median of the rounds' ratios."""
    cpu_ratio: float
    """The bare loop's CPU time over ours: what a busy neighbour does not touch."""
    growth_mib: float
    """What the process's peak memory grew by after the first round."""


def main() -> None:
    """Runs the races, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path, help="folder of photographs")
    parser.add_argument("--rounds", type=int, default=5, help="how often both run")
    parser.add_argument("--samples", type=int, default=48, help="pictures per round, in two shards")
    parser.add_argument("--batch-size", type=int, default=12, help="samples per forward pass")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both; a Ray actor has one")
    parser.add_argument("--only", nargs="+", choices=["embed", "encode"], default=["embed", "encode"])
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        if "embed" in options.only:
            shards = make_shards(options.photos, Path(scratch, "256"), options.samples, 256)
            clip = write_clip("ViT-B-32", Path(scratch, "clip"))
            config = EmbedConfig(batch_size=options.batch_size)
            found.append(race("embed, ViT-B/32", *embed_race(clip, shards, config), options))
        if "encode" in options.only:
            shards = make_shards(options.photos, Path(scratch, "64"), options.samples, 64)
            vae = write_vae(SD_VAE, Path(scratch, "vae"))
            config = EncodeConfig(batch_size=options.batch_size)
            found.append(race("encode, SD VAE at 64 px", *encode_race(vae, shards, config), options))
    show(found)
    if options.json:
        options.json.write_text(json.dumps([asdict(figures) for figures in found], indent=1) + "\n")


def make_shards(photos: Path | None, folder: Path, count: int, size: int) -> tuple[str, list[ShardRecord]]:
    """(folder, records) of two shards of `count` pictures of `size` px: those of `photos` over and over, or drawn ones."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    found = sorted(p for p in photos.iterdir() if p.suffix.lower() in (".jpg", ".jpeg")) if photos else []
    for number in range(count):
        path = pictures / f"{number:06d}.jpg"
        path.write_bytes(found[number % len(found)].read_bytes()) if found else _draw(path, number, size)
        path.with_suffix(".txt").write_text(f"a photograph, the one with number {number}")
    rows = sources.list_rows(SourceConfig(path=str(pictures)))
    out, half = str(folder / "shards"), -(-count // 2)
    config = ShardConfig(image_size=size, samples_per_shard=half)
    return out, [write_shard(rows[i * half : (i + 1) * half], i, out, config) for i in range(2)]


def write_clip(name: str | dict[str, Any], folder: Path) -> str:
    """An open_clip architecture with random weights in open_clip's local-dir form."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir()
    config = open_clip.get_model_config(name) if isinstance(name, str) else name
    size = config["vision_cfg"]["image_size"]
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"size": size}})
    )
    model = open_clip.model.CLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def write_vae(config: dict[str, Any], folder: Path) -> str:
    """An `AutoencoderKL` with random weights."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**config).save_pretrained(folder)
    return str(folder)


def embed_race(
    clip: str, shards: tuple[str, list[ShardRecord]], config: EmbedConfig
) -> tuple[Callable[[str], None], Callable[[], None], int]:
    """(our work on every shard, the bare loop, samples of one round)."""
    data, records = shards
    work = Embedding(clip, data, config, None)
    towers = work.clip.towers

    def ours(out: str) -> None:
        for record in records:  # the empty caption is embedded once per dataset, which is not counted here
            work(ShardTask(record.index, record), out)()

    batches = [
        (work.clip._prepared(pixels), towers.tokens(captions)[0].to(work.device))
        for pixels, captions in preloaded(data, records, config.batch_size, work.device)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for pixels, tokens in batches:
            last = towers.image(pixels), towers.text(tokens)[0]
        [embedding.cpu() for embedding in last]

    return ours, bare, sum(record.samples for record in records)


def encode_race(
    vae: str, shards: tuple[str, list[ShardRecord]], config: EncodeConfig
) -> tuple[Callable[[str], None], Callable[[], None], int]:
    """(our work on every shard, the bare loop, samples of one round)."""
    data, records = shards
    work = Encoding(vae, data, config)
    network = work.vae.vae

    def ours(out: str) -> None:
        for record in records:
            work(ShardTask(record.index, record), out)()

    batches = [
        to_unit_range(pixels.to(work.device)).to(network.dtype)
        for pixels, _ in preloaded(data, records, config.batch_size, work.device)
    ]

    @torch.inference_mode()
    def bare() -> None:
        for pixels in batches:
            last = network.encode(pixels, return_dict=False)[0]
        last.parameters.cpu()

    return ours, bare, sum(record.samples for record in records)


def preloaded(
    data: str, records: list[ShardRecord], batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """(pixels, captions) of the batches that the stage makes of these shards."""
    for record in records:
        with ShardReader(f"{data}/{record.index:05d}.tar") as reader:
            for batch in decoded(reader, batch_size, device):
                assert isinstance(batch.pixels, torch.Tensor)
                yield batch.pixels, [reader.caption(row) for row in batch.rows]


def race(
    what: str, ours: Callable[[str], None], bare: Callable[[], None], samples: int, options: Any
) -> Figures:
    """Both once to warm up, then in turns."""
    bare()
    with tempfile.TemporaryDirectory() as out:
        ours(out)
        before = _peak_mib()
        rounds = [(timed(lambda: ours(out)), timed(bare)) for _ in range(options.rounds)]
    return Figures(
        what=what,
        ours_per_s=samples / median(mine[0] for mine, _ in rounds),
        bare_per_s=samples / median(other[0] for _, other in rounds),
        ratio=median(other[0] / mine[0] for mine, other in rounds),
        cpu_ratio=median(other[1] / mine[1] for mine, other in rounds),
        growth_mib=_peak_mib() - before,
    )


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds of the whole process)."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def show(found: list[Figures]) -> None:
    """One row per race."""
    table = Table(
        "what", "ours, samples/s", "bare", "ours / bare", "bare CPU / our CPU", "growth, MiB", "target"
    )
    for f in found:
        numbers = (f"{f.ours_per_s:,.2f}", f"{f.bare_per_s:,.2f}", f"{f.ratio:.3f}", f"{f.cpu_ratio:.3f}")
        table.add_row(f.what, *numbers, f"{f.growth_mib:,.0f}", f"{TARGET:g}")
    Console().print(table)


def _draw(path: Path, number: int, size: int) -> None:
    coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
