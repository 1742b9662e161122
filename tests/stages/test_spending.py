"""What a stage spends is counted over all of its attempts, and priced by device."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.config import Config
from data.manifest import load_snapshot
from stages import spending
from stages.contract import Stage, Workspace, commit
from stages.spending import Meter, PricesConfig

NOTHING = Stage(
    name="nothing",
    version=1,
    reads=lambda _: frozenset(),
    writes=lambda _: frozenset(),
    config=Config,
    run=lambda *_: pytest.fail("is not run"),
)


def test_a_cost_is_hours_times_prices():
    prices = PricesConfig(cpu_hour=0.04, gpu_hour=2.5, currency="EUR")
    assert prices.cost({"cpu": 7200.0, "gpu": 1800.0}) == pytest.approx(2 * 0.04 + 0.5 * 2.5)
    assert prices.told({"cpu": 7200.0, "gpu": 1800.0}) == "1.33 EUR"
    assert prices.told({"cpu": 1800.0}) == "0.02 EUR"


def test_without_a_price_for_each_device_nothing_is_said_of_money():
    assert PricesConfig(gpu_hour=2.5).told({"cpu": 3600.0, "gpu": 3600.0}) == ""
    assert PricesConfig(gpu_hour=2.5).told({}) == PricesConfig().told({"cpu": 1.0}) == ""


def test_a_price_is_not_negative():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        PricesConfig(cpu_hour=-1.0)


def test_hours_name_their_devices():
    assert spending.hours({"gpu": 7200.0, "cpu": 1260.0}) == "0.35 CPU-hours, 2 GPU-hours"
    assert spending.hours({}) == ""


@pytest.fixture
def pass_time(monkeypatch) -> Callable[[float], None]:
    """(seconds): lets them pass on the clock that meters read, which stands still otherwise."""
    now = [1000.0]
    monkeypatch.setattr(spending.time, "monotonic", lambda: now[0])

    def ahead(seconds: float) -> None:
        now[0] += seconds

    return ahead


def test_every_worker_counts_for_as_long_as_it_holds_its_devices(tmp_path: Path, pass_time):
    meter = Meter(str(tmp_path), "f" * 12, "gpu", each=0.5)
    pass_time(2)
    meter.tell(workers=4)
    pass_time(100)
    meter.tell(workers=0)
    meter.note()
    assert spending.spent(str(tmp_path), "f" * 12) == {"gpu": 4 * 0.5 * 2}


def test_time_passes_into_the_store_so_that_a_killed_attempt_counts(tmp_path: Path, pass_time):
    killed = Meter(str(tmp_path), "f" * 12, "cpu")
    pass_time(spending.NOTED_EVERY_SECONDS - 1)
    killed.tell(workers=1)
    assert spending.spent(str(tmp_path), "f" * 12) == {}, "not every call writes"
    pass_time(1)
    killed.tell(workers=1)  # and no word more
    again, other = Meter(str(tmp_path), "f" * 12, "cpu"), Meter(str(tmp_path), "e" * 12, "cpu")
    pass_time(20)
    again.tell(workers=3)
    other.tell(workers=100)
    assert spending.spent(str(tmp_path), "f" * 12) == {"cpu": spending.NOTED_EVERY_SECONDS + 60}


def test_what_cannot_be_noted_ends_no_stage(tmp_path: Path):
    (tmp_path / "file").write_text("")
    Meter(str(tmp_path / "file"), "f" * 12, "cpu").note()


def test_a_snapshot_holds_what_was_spent_and_is_the_same_whatever_that_was(tmp_path: Path, pass_time):
    digests = []
    for workers in (1, 50):
        workspace = Workspace(str(tmp_path / str(workers)), "f" * 12)
        meter = Meter(workspace.folder, workspace.fingerprint, "cpu")
        pass_time(2)
        meter.tell(workers)
        meter.note()
        made = commit(NOTHING, Config(), {}, workspace, started=time.monotonic())
        kept = load_snapshot(workspace.folder, workspace.fingerprint)
        assert (
            kept
            and kept.device_seconds == made.device_seconds
            and made.device_seconds == {"cpu": 2.0 * workers}
        )
        assert spending.spent(workspace.folder, workspace.fingerprint) == {}, "told once"
        digests.append(made.digest)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("damage", ["", "{", "3", '{"cpu": []}', '{"cpu": "much"}'])
def test_a_note_that_is_damaged_counts_for_nothing_and_ends_no_stage(tmp_path: Path, damage: str):
    notes = tmp_path / "_meta" / "spent"
    notes.mkdir(parents=True)
    (notes / "f-0.json").write_text('{"cpu": 2.0}')
    (notes / "f-1.json").write_text(damage)
    assert spending.spent(str(tmp_path), "f") == {"cpu": 2.0}
