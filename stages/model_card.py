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
    """Wall seconds and device seconds of the steps that count, whatever was interrupted between them.

    A row that an interruption divides counts at the pace of its later part; steps of which no row tells count for nothing.
    """
    wall = device = 0.0
    before = rows[0]["samples"] * _untold(rows) / rows[0]["step"] if rows else 0
    for row in rows:
        seconds = (row["samples"] - before) / row["samples_per_second"] if row["samples_per_second"] else 0.0
        before = row["samples"]
        wall += seconds
        device += seconds * row["devices"]
    return {"wall_seconds": wall, "device_seconds": device}


def _untold(rows: Sequence[Mapping[str, Any]]) -> int:
    """How many steps were done before those of the first row: metrics may have been lost."""
    return rows[0]["step"] - rows[0]["steps"] if rows else 0


def _held_out(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last held-out loss of the averaged weights, and the lowest where that was another; empty without any."""
    asked = [(row["validation_loss"], row["step"]) for row in rows if row.get("validation_loss") is not None]
    if not asked:
        return ""
    (loss, _), (lowest, step) = asked[-1], min(asked)
    return f"{loss:.4g}" if lowest == loss else f"{loss:.4g}; it was lowest at step {step:,}: {lowest:.4g}"


def _training(
    config: TrainConfig, facts: dict[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, object]:
    spent = cost(rows)
    untold = f" after step {_untold(rows):,}, of earlier ones there are no metrics" if _untold(rows) else ""
    hardware = dict.fromkeys(f"{row['devices']} × {row['device']}" for row in rows)
    return {
        "steps": f"{config.max_steps:,}",
        "samples per step": config.batch_size,
        "seed": config.seed,
        "last loss": facts.get("final_loss"),
        **({"held-out loss": held_out} if (held_out := _held_out(rows)) else {}),
        "hardware": ", then ".join(hardware),
        "wall time": f"{spent['wall_seconds']:.0f} s in steps{untold}",
        "device-hours": f"{spent['device_seconds'] / 3600:.4f}",
    }


def _data(inputs: Inputs) -> dict[str, object]:
    return {
        role: f"{s.stage} {s.fingerprint}, {s.samples:,} samples, digest {s.digest[:12]}"
        for role, s in inputs.items()
    }


def _table(rows: dict[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
