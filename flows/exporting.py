"""A finished run as a folder of diffusers' pipelines, on this machine alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from data.errors import UserError
from data.loader import ColumnSet
from data.manifest import snapshots
from flows.drawing import trained_parts
from training.export import export, require_empty
from training.systems.embeddings import spread_indices
from training.systems.unclip import Unclip

PICTURES = 256
"""Over which the mean length of the run's picture embeddings is taken."""


def export_run(record: Mapping[str, Any], out: str) -> Path:
    """Writes the pipelines of the run `record` into the folder `out`, which is empty or made; returns its path."""
    folder = Path(out).expanduser()
    require_empty(folder)
    disable_progress_bar()  # one for each network, of a single step
    folders = trained_parts(record)
    system = Unclip.load(folders["clip"], folders["vae"], folders["prior"], folders["denoiser"])
    shards = snapshots(folders["shard"])
    if not shards:
        raise UserError(f"run {record['run']} has lost its shards: run its recipe again")
    data = ColumnSet(shards[-1:])
    rows = data.rows("image", spread_indices(len(data), PICTURES))
    export(system, torch.from_numpy(rows).permute(0, 3, 1, 2), folder)
    return folder
