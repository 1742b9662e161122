"""Duplicate pictures: the first of each stays, whatever shard the others lie in, and deciding again changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.duplicates import Repeat, repeats
from data.rows import Row
from data.shards import ShardConfig, drop_repeats, write_shard
from data.tars import ShardReader


def table(*rows: tuple[str, str, str | None]) -> pa.Table:
    """(key, sha256, status) of each row; `None`: success."""
    return pa.table(
        {
            "key": [key for key, *_ in rows],
            "status": ["success" if reason is None else "filtered" for *_, reason in rows],
            "error_class": pa.array([reason for *_, reason in rows], pa.string()),
            "sha256": [digest for _, digest, _ in rows],
            "phash": ["0" * 16 for _ in rows],
        }
    )


def test_the_first_of_equal_pictures_stays_across_shards():
    found = repeats(
        [table(("00", "a", None), ("01", "a", None)), table(("10", "b", None), ("11", "a", None))], None
    )
    assert found == [[Repeat("01", "duplicate_image", "00")], [Repeat("11", "duplicate_image", "00")]]


def test_a_row_that_was_not_written_is_no_original():
    assert repeats([table(("00", "a", "too_small"), ("01", "a", None))], None) == [[]]


def test_deciding_after_the_decision_was_carried_out_decides_the_same():
    before = repeats([table(("00", "a", None), ("01", "a", None))], None)
    assert repeats([table(("00", "a", None), ("01", "a", "duplicate_image"))], None) == before


@pytest.fixture
def shard(tmp_path: Path) -> tuple[str, ShardConfig]:
    """One shard of four pictures: a, its copy, a little brighter a, and another."""
    noise = np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)
    first = np.asarray(Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC))
    other = np.asarray(Image.fromarray(255 - noise[::-1]).resize((64, 64), Image.Resampling.BICUBIC))
    brighter = np.clip(first.astype(int) + 6, 0, 255).astype(np.uint8)
    rows = []
    for number, pixels in enumerate((first, first, brighter, other)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(path)
        rows.append(Row(number, str(path), f"picture {number}", path.name))
    config = ShardConfig(image_size=64, samples_per_shard=4, deduplicate="near")
    write_shard(rows, 0, str(tmp_path / "out"), config)
    return str(tmp_path / "out"), config


def _repeats(folder: str, config: ShardConfig) -> list[Repeat]:
    return repeats([pq.read_table(f"{folder}/00000.parquet")], config.near_distance)[0]


def test_repeats_leave_the_tar_and_stay_in_the_ledger(shard):
    folder, config = shard
    with ShardReader(f"{folder}/00000.tar") as reader:
        kept = [reader.image(0), reader.image(3)]
    found = _repeats(folder, config)
    assert [repeat.reason for repeat in found] == ["duplicate_image", "near_duplicate_image"]
    record = drop_repeats(folder, 0, found)
    assert record.samples == 2 and record.ledger.filtered == {"duplicate_image": 1, "near_duplicate_image": 1}
    assert record.ledger.attempted == 4
    with ShardReader(f"{folder}/00000.tar") as reader:
        assert [reader.image(row) for row in range(2)] == kept
    assert drop_repeats(folder, 0, _repeats(folder, config)) == record, "doing it again changes nothing"


def test_killed_between_the_files_it_is_carried_out_by_the_next_attempt(shard):
    folder, config = shard
    found, table = _repeats(folder, config), Path(folder, "00000.parquet").read_bytes()
    record = drop_repeats(folder, 0, found)
    Path(folder, "00000.parquet").write_bytes(table)  # as if killed after the tar was published
    assert drop_repeats(folder, 0, _repeats(folder, config)) == record


def test_a_shard_of_nothing_but_repeats_has_no_tar(shard):
    folder, _ = shard
    every = [Repeat(f"00000000{row}", "duplicate_image", "x") for row in range(4)]
    record = drop_repeats(folder, 0, every)
    assert record.samples == 0 and not Path(folder, "00000.tar").exists()
    assert drop_repeats(folder, 0, every) == record
