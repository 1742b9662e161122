"""Rows of a training: kept in Parquet and in TensorBoard's own format, across interruptions."""

from __future__ import annotations

import struct
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event

from data.errors import UserError
from training import sinks
from training.sinks import Sinks


def _row(step: int, loss: float, **more: object) -> dict[str, object]:
    return {"step": step, "loss": loss, **more}


def _events(folder: Path) -> list[Event]:
    """Every event of the files under `folder`, read by the format's definition: length, CRC, payload, CRC."""
    found = []
    for path in sorted((folder / "tensorboard").glob("events.*")):
        payload = path.read_bytes()
        while payload:
            (length,) = struct.unpack("<Q", payload[:8])
            found.append(Event.FromString(payload[12 : 12 + length]))
            payload = payload[12 + length + 4 :]
    return found


def test_rows_are_kept_as_columns_and_as_scalars(tmp_path: Path) -> None:
    kept = Sinks(str(tmp_path))
    kept.write(_row(20, 0.5, device="cpu"))
    kept.write(_row(40, 0.25, validation_loss=0.75, device="cpu"))
    kept.close()
    assert pq.read_table(tmp_path / "metrics.parquet").to_pylist() == [
        {"step": 20, "loss": 0.5, "device": "cpu", "validation_loss": None},
        {"step": 40, "loss": 0.25, "device": "cpu", "validation_loss": 0.75},
    ]
    scalars = [(v.tag, e.step, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
    assert scalars == [("loss", 20, 0.5), ("loss", 40, 0.25), ("validation_loss", 40, 0.75)]


def test_steps_that_are_made_again_replace_those_of_the_killed_process(tmp_path: Path) -> None:
    first = Sinks(str(tmp_path))
    for step in (20, 40, 60):
        first.write(_row(step, 1.0))
    first.close()
    second = Sinks(str(tmp_path))
    second.write(_row(40, 0.5))
    second.close()
    rows = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [(row["step"], row["loss"]) for row in rows] == [(20, 1.0), (40, 0.5)]
    starts = [event for event in _events(tmp_path) if event.session_log.status == 1]
    assert [event.step for event in starts] == [20, 40], "TensorBoard is told to forget what came after"


def test_many_rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    kept = Sinks(str(tmp_path))
    for step in range(1, 52):
        kept.write(_row(step, 1.0))
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 50
    kept.close()
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 51


def test_what_a_checkpoint_holds_is_on_disk_before_it(tmp_path: Path) -> None:
    """Else a kill after it would leave a hole: nobody tells those steps again."""
    kept = Sinks(str(tmp_path))
    kept.write(_row(20, 1.0))
    kept.flush()
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 1
    written = (tmp_path / "metrics.parquet").stat().st_mtime_ns
    kept.flush()
    assert (tmp_path / "metrics.parquet").stat().st_mtime_ns == written, "nothing is new"
    assert [v.tag for e in _events(tmp_path) for v in e.summary.value] == ["loss"]


def test_a_service_without_its_library_is_refused_by_its_setting() -> None:
    sinks.require("", "vae.log_to")
    with pytest.raises(UserError, match=r"vae\.log_to=nowhere_to_log, but the Python library nowhere_to_log"):
        sinks.require("nowhere_to_log", "vae.log_to")
