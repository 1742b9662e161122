"""Figures as Prometheus sees them: scraped from the metrics endpoint of a real Ray node."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import add_pictures

from data import sources
from data.errors import CorruptArtifact, StageFailed
from data.manifest import FileRecord, Ledger, ShardRecord, Snapshot, keys_digest, publish_snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from stages import logs, spending, telemetry, train
from stages.contract import FanoutConfig, Workspace
from stages.fanout import ShardTask, map_shards
from training.systems.vae import VaeConfig

CHECKOUT = Path(__file__).parents[2]
PLACE = {"run": "demo-1", "stage": "embed"}


def test_without_ray_nothing_is_told_and_nothing_is_imported():
    script = "import sys; from stages import telemetry; telemetry.tell('darkroom_loss', 1.0); sys.exit('ray' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=60).returncode == 0


class Writing:
    """A shard of two rows written, one filtered and one failed, of 10 bytes; or a defect."""

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        if task.payload == "defect":
            raise RuntimeError("a defect")
        telemetry.tell("darkroom_batches_ready", 2)
        ledger = Ledger(written=2, filtered={"too_small": 1}, failed={"truncated": 1})
        Path(folder, f"{task.index}.txt").write_text("ten bytes!")
        files = (FileRecord(path=f"{task.index}.txt", bytes=10, sha256="0" * 64),)
        return ShardRecord(index=task.index, samples=2, keys=keys_digest([]), files=files, ledger=ledger)


Scrape = Callable[..., float | None]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The metrics endpoint of a Ray of this process, which reports every half second."""
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
        runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}},
    )
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


@pytest.fixture(scope="module")
def scrape(endpoint: str) -> Scrape:
    """(name, until, **tags) -> the sum of what the endpoint has of it, once it is `until`, or in the end."""

    def read(name: str, **tags: str) -> float | None:
        text = urllib.request.urlopen(endpoint, timeout=10).read().decode()
        found = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"ray_{name}" and tags.items() <= sample.labels.items()
        ]
        return sum(found) if found else None

    def wait(name: str, until: float | None = None, **tags: str) -> float | None:
        deadline = time.monotonic() + 30
        while (value := read(name, **tags)) is None or (until is not None and value != until):
            if time.monotonic() > deadline:
                break
            time.sleep(0.5)
        return value

    return wait


@pytest.fixture(scope="module")
def shards(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ARG001
    """Three shards are made, and one that is not, in two attempts."""
    folder = str(tmp_path_factory.mktemp("shards"))
    tasks = [ShardTask(index, "fine", weight=4) for index in range(3)] + [ShardTask(3, "defect", weight=4)]
    fanout = FanoutConfig(num_workers=1, max_attempts=2)
    with logs.at(**PLACE), pytest.raises(StageFailed, match="1 of 4 shards failed"):
        map_shards(Writing, {}, tasks, Workspace(folder, "f" * 12, fanout))


@pytest.mark.slow
@pytest.mark.usefixtures("shards")
@pytest.mark.parametrize(
    ("name", "tags", "value"),
    [
        ("darkroom_samples_total", {}, 12),
        ("darkroom_bytes_total", {}, 30),
        ("darkroom_rows_total", {"outcome": "written", "reason": ""}, 6),
        ("darkroom_rows_total", {"outcome": "filtered", "reason": "too_small"}, 3),
        ("darkroom_rows_total", {"outcome": "failed", "reason": "truncated"}, 3),
        ("darkroom_failed_attempts_total", {"reason": "RuntimeError"}, 2),
        ("darkroom_shard_seconds_count", {}, 3),
        ("darkroom_shards_waiting", {}, 0),
        ("darkroom_batches_ready", {}, 2),
    ],
)
def test_what_a_fan_out_did_is_scraped(scrape, name, tags, value):
    assert scrape(name, until=value, **PLACE, **tags) == value


@pytest.mark.slow
@pytest.mark.usefixtures("shards")
def test_devices_are_counted_by_the_time_that_they_were_held(scrape):
    seconds = scrape("darkroom_device_seconds_total", device="cpu", **PLACE)
    assert seconds is not None and 0 < seconds < 120


@pytest.mark.slow
def test_a_row_of_a_training_is_scraped(scrape):
    row = {"steps": 20, "skipped": 1, "loss": 0.5, "data_wait": 0.25, "mfu": 0.4, "validation_loss": None}
    with logs.at(run="demo-1", stage="prior"):
        telemetry.tell_row(row, batch_size=8)
        telemetry.tell_row(row | {"loss": 0.25}, batch_size=8)
    place = {"run": "demo-1", "stage": "prior"}
    assert scrape("darkroom_samples_total", until=320, **place) == 320
    assert scrape("darkroom_skipped_steps_total", until=2, **place) == 2
    assert scrape("darkroom_loss", until=0.25, **place) == 0.25
    assert scrape("darkroom_data_wait", **place) == 0.25
    assert scrape("darkroom_mfu", **place) == 0.4


@pytest.fixture
def cut_short(tmp_path: Path) -> Snapshot:
    """Shards of six pictures whose archive has lost its end."""
    rows = sources.list_rows(SourceConfig(path=str(add_pictures(tmp_path / "pictures", range(6)))))
    folder = str(tmp_path / "shards")
    record = write_shard(rows, 0, folder, ShardConfig(image_size=16))
    os.truncate(Path(folder, "00000.tar"), 5000)
    columns = ("caption", "image")
    made = Snapshot(
        stage="shard", version=1, fingerprint="d" * 12, config={}, columns=columns, shards=(record,)
    )
    return publish_snapshot(folder, made)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("endpoint")
def test_a_training_that_failed_is_scraped_with_its_reason_and_what_it_spent(scrape, cut_short, tmp_path):
    config = VaeConfig(block_out_channels=(8, 8), norm_num_groups=4, max_steps=4, batch_size=4, num_workers=1)
    place = {"run": "demo-1", "stage": "vae"}
    folder = str(tmp_path / "vae")
    with logs.at(**place), pytest.raises(CorruptArtifact, match=r"00000\.tar, byte"):
        train.run("vae", config, {"data": cut_short}, Workspace(folder, "f" * 12))
    assert scrape("darkroom_failed_attempts_total", until=1, reason="CorruptArtifact", **place) == 1
    seconds = scrape("darkroom_device_seconds_total", device="cpu", **place)
    assert seconds is not None and seconds > 0
    assert spending.spent(folder, "f" * 12)["cpu"] > 0
