"""The card beside published weights, and what a training cost whatever interrupted it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.manifest import Ledger, ShardRecord, Snapshot
from stages import model_card
from training.systems.vae import VaeConfig


def _rows() -> list[dict[str, object]]:
    """Ten seconds on two devices, then, resumed, five on one."""
    return [
        {
            "step": 20,
            "samples": 200,
            "samples_per_second": 20.0,
            "devices": 2,
            "device": "H100",
            "steps": 20,
            "validation_loss": 0.5,
        },
        {
            "step": 40,
            "samples": 400,
            "samples_per_second": 40.0,
            "devices": 1,
            "device": "H200",
            "steps": 20,
            "validation_loss": 0.75,
        },
    ]


def test_the_cost_is_the_time_in_steps_times_the_devices_that_made_them() -> None:
    assert model_card.cost(_rows()) == {"wall_seconds": 15.0, "device_seconds": 25.0}
    assert model_card.cost(_rows()[1:]) == {"wall_seconds": 5.0, "device_seconds": 5.0}
    assert model_card.cost([]) == {"wall_seconds": 0.0, "device_seconds": 0.0}


@pytest.mark.parametrize(
    "line",
    [
        "# vae abc",
        "| steps | 40 |",
        "| seed | 7 |",
        "| last loss | 0.25 |",
        "| held-out loss | 0.75; it was lowest at step 20: 0.5 |",
        "| hardware | 2 × H100, then 1 × H200 |",
        "| wall time | 15 s in steps |",
        "| device-hours | 0.0069 |",
        "| data | shard f00, 90 samples, digest",
        '"learning_rate": 0.5',
    ],
)
def test_the_card_says_what_made_the_weights(tmp_path: Path, line: str) -> None:
    assert line in _card(tmp_path, _rows())


def test_the_card_says_where_metrics_are_missing(tmp_path: Path) -> None:
    card = _card(tmp_path, _rows()[1:])
    assert "| wall time | 5 s in steps after step 20, of earlier ones there are no metrics |" in card


def _card(folder: Path, rows: list[dict[str, object]]) -> str:
    (folder / "_meta").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "_meta" / "metrics.parquet")
    shard = ShardRecord(index=0, samples=90, keys="", files=(), ledger=Ledger(written=90))
    inputs = {"data": Snapshot(stage="shard", version=1, fingerprint="f00", config={}, shards=(shard,))}
    config = VaeConfig(max_steps=40, seed=7, learning_rate=0.5)
    model_card.write(str(folder), "vae", "abc", config, inputs, {"final_loss": 0.25})
    return (folder / model_card.NAME).read_text()
