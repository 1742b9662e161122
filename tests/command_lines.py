"""Real command lines of Darkroom on tiny settings, and what they print.

Not in conftest.py: pytest loads that under a name of its own, and who imports it by name has a second one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parent.parent
SHARED = CHECKOUT.parent / "shared" / "datasets"

SMALL_NETWORKS = {
    "clip.vision_width": 16,
    "clip.vision_layers": 1,
    "clip.embed_dim": 16,
    "clip.text_width": 16,
    "clip.text_layers": 1,
    "vae.block_out_channels": "8,8,8",
    "prior.num_layers": 1,
    "prior.attention_head_dim": 8,
    "denoiser.block_out_channels": "8,8",
    "denoiser.norm_num_groups": 4,
    "denoiser.num_attention_heads": 2,
}
"""Of a demo whose pictures nobody looks at."""

TINY = {
    **SMALL_NETWORKS,
    "source.count": 240,
    "shard.samples_per_shard": 80,
    "evaluate.num_images": 16,
    "evaluate.num_inference_steps": 3,
    "evaluate.prior_steps": 3,
    "evaluate.reconstruction_images": 60,
    **{f"{stage}.max_steps": 8 for stage in ("clip", "vae", "prior", "denoiser")},
    **{f"{stage}.checkpoint_every": 2 for stage in ("clip", "vae", "prior", "denoiser")},
    **{f"{stage}.batch_size": 16 for stage in ("clip", "vae", "prior", "denoiser")},
    **{f"{stage}.num_workers": 1 for stage in ("clip", "vae", "prior", "denoiser", "fanout")},
}
"""Everything that a demo does, at a size that takes seconds per stage."""


def command(*arguments: str, root: Path, settings: dict[str, Any] | None = None) -> list[str]:
    """The command line of `darkroom *arguments`, with `settings` as `--set` options."""
    options = [f"--set={path}={value}" for path, value in (settings or {}).items()]
    return [sys.executable, "-m", "flows.cli", *arguments, f"--root={root}", *options]


PREFECT_HOME = tempfile.TemporaryDirectory(prefix="darkroom-prefect-", ignore_cleanup_errors=True)
"""Of every run that this process starts: making Prefect's tables takes as much CPU time as a stage of a tiny run."""


def environment() -> dict[str, str]:
    """The environment that a shell in the checkout would give, and a database of Prefect's that is there already."""
    ours = {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    return os.environ | ours | {"PREFECT_HOME": PREFECT_HOME.name}


def result(finished: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON line on stdout of a command that succeeded."""
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("\n") == 1, "with --json nothing else goes to stdout"
    return json.loads(finished.stdout)
