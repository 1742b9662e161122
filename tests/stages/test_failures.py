"""How many rows may fail; what an outage made of a shard is no answer for the next run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data import manifest
from data.errors import StageFailed, UserError
from data.manifest import Ledger, ShardRecord
from data.rows import Row
from data.shards import ShardConfig, write_shard
from stages.failures import check_failures


def shard(folder: Path, index: int, *reasons: str) -> ShardRecord:
    """A shard of four rows, of which one failed for each of `reasons`."""
    failed = {reason: reasons.count(reason) for reason in reasons}
    ledger = Ledger(written=4 - len(reasons), failed=failed)
    record = ShardRecord(index=index, samples=ledger.written, keys="", files=(), ledger=ledger)
    rows = [Row(i, "", None, f"row {i}", (reason, f"{reason}!")) for i, reason in enumerate(reasons)]
    write_shard(rows, index, str(folder), ShardConfig())
    manifest.publish_receipt(str(folder), record)
    return record


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., list[int]]:
    """(limit, *failures of each shard) -> indices of the receipts that are left, after the check raised."""

    def run(limit: float, *failures: tuple[str, ...]) -> list[int]:
        records = [shard(tmp_path, index, *reasons) for index, reasons in enumerate(failures)]
        with pytest.raises((StageFailed, UserError)):
            check_failures("pairs", limit, records, records, Ledger(), str(tmp_path))
        return [i for i in range(len(records)) if manifest.load_receipt(str(tmp_path), i)]

    return run


def test_within_the_limit_nothing_happens(tmp_path: Path) -> None:
    records = [shard(tmp_path, 0, "unavailable"), shard(tmp_path, 1)]
    check_failures("pairs", 0.125, records, records, Ledger(), str(tmp_path))
    assert manifest.load_receipt(str(tmp_path), 0)


def test_past_the_limit_the_first_rows_are_named(tmp_path: Path) -> None:
    records = [shard(tmp_path, 0, "truncated")]
    with pytest.raises(StageFailed, match=r"1 of 4 rows failed \(1 truncated\), .*row row 0: truncated!"):
        check_failures("pairs", 0.2, records, records, Ledger(), str(tmp_path))


def test_shards_that_an_outage_struck_are_attempted_by_the_next_run(check) -> None:
    struck, well = ("unavailable",) * 3, ()
    assert check(0.3, struck, well, ("missing_image",) * 2) == [1]


def test_where_no_row_was_written_it_is_alike(check) -> None:
    assert check(0.3, ("unavailable",) * 4, ("missing_image",) * 4) == []


def test_what_will_fail_again_keeps_its_shard(check) -> None:
    assert check(0.2, ("truncated", "corrupt_image"), ("truncated",), ("unavailable", "truncated")) == [0, 1]
