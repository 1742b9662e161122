"""The page beside published weights: what they are, what made them, and what that cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data import storage
from data.config import result_fields
from stages.contract import Inputs
from training.sinks import rows_at
from training.systems.system import TrainConfig

NAME = "README.md"
"""No part of the artifact's digest: it holds times, and an artifact is a function of its inputs."""


def write(
    folder: str, name: str, fingerprint: str, config: TrainConfig, inputs: Inputs, facts: dict[str, Any]
) -> None:
    """Writes the card of the weights that lie in `folder`, from `_meta/metrics.parquet` and what is given."""
    rows = rows_at(storage.join(folder, "_meta", "metrics.parquet"))
    storage.write_bytes(
        storage.join(folder, NAME),
        "\n\n".join(
            [
                f"# {name} {fingerprint}",
                f"Averaged (EMA) weights of `{name}`, trained by Darkroom. `curve.parquet` holds the training curve, "
                "`_meta/metrics.parquet` the same with its times, `_meta/tensorboard` what `tensorboard --logdir` shows.",
                "## Training\n\n" + _table(_training(config, facts, rows)),
                "## Data\n\n" + _table(_data(inputs)),
                f"## Recipe\n\n```json\n{json.dumps(result_fields(config), indent=1)}\n```\n",
            ]
        ).encode(),
    )


def cost(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Wall seconds and device seconds of the steps that count, whatever was interrupted between them."""
    wall = device = 0.0
    before = 0
    for row in rows:
        seconds = (row["samples"] - before) / row["samples_per_second"] if row["samples_per_second"] else 0.0
        before = row["samples"]
        wall += seconds
        device += seconds * row["devices"]
    return {"wall_seconds": wall, "device_seconds": device}


def _training(
    config: TrainConfig, facts: dict[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, object]:
    spent = cost(rows)
    hardware = dict.fromkeys(f"{row['devices']} × {row['device']}" for row in rows)
    return {
        "steps": f"{config.max_steps:,}",
        "samples per step": config.batch_size,
        "seed": config.seed,
        "last loss": facts.get("final_loss"),
        "hardware": ", then ".join(hardware),
        "wall time": f"{spent['wall_seconds']:.0f} s in steps",
        "device-hours": f"{spent['device_seconds'] / 3600:.4f}",
    }


def _data(inputs: Inputs) -> dict[str, object]:
    return {
        role: f"{s.stage} {s.fingerprint}, {s.samples:,} samples, digest {s.digest[:12]}"
        for role, s in inputs.items()
    }


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
