"""How fast VAE encoding is on one GPU: Stable Diffusion's VAE with random weights, the stage's own work beside a bare loop.

    python infra/bench/gpu_encode.py [--samples 2048] [--batch-size 32] [--precision bf16] [--json result.json]

The work and the bare loop are those of embed.py beside this file. Prints rows for RESULTS.md. `--tiny` shrinks everything
so that a CPU runs it in seconds: it shows that the script works and nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import embed
import gpu_embed

from stages.encode import EncodeConfig

TINY_VAE = {**embed.SD_VAE, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SIZES = (512, 256)


def main() -> None:
    """Runs one race per picture size and prints their rows."""
    options = gpu_embed.arguments(__doc__ or "", samples=2048, batch_size=32)
    config = EncodeConfig(
        batch_size=options.batch_size, precision=options.precision, decode_threads=options.decode_threads
    )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        vae = embed.write_vae(TINY_VAE if options.tiny else embed.SD_VAE, Path(scratch, "vae"))
        for size in (16,) if options.tiny else SIZES:
            shards = embed.make_shards(options.photos, Path(scratch, str(size)), options.samples, size)
            kind = "tiny" if options.tiny else "SD VAE"
            what = f"encode, {kind} at {size} px, {options.precision}, batch {options.batch_size}"
            found.append(embed.race(what, *embed.encode_race(vae, shards, config), options))
    gpu_embed.report(found, options)


if __name__ == "__main__":
    main()
