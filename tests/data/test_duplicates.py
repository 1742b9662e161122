"""Duplicate pictures: the first of each stays, whatever shard the others lie in, and deciding again changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.duplicates import Repeat, repeats
from data.manifest import ShardRecord
from data.rows import Row
from data.shards import ShardConfig, settle_shard, write_shard
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


def _settled(shard: tuple[str, ShardConfig], folder: Path) -> ShardRecord:
    draft, config = shard
    found = repeats([pq.read_table(f"{draft}/00000.parquet")], config.near_distance)[0]
    assert [repeat.reason for repeat in found] == ["duplicate_image", "near_duplicate_image"]
    return settle_shard(draft, str(folder), 0, found)


def test_repeats_leave_the_tar_and_stay_in_the_ledger(shard, tmp_path):
    record = _settled(shard, tmp_path / "final")
    assert record.samples == 2 and record.ledger.attempted == 4
    assert record.ledger.filtered == {"duplicate_image": 1, "near_duplicate_image": 1}
    with ShardReader(f"{shard[0]}/00000.tar") as draft, ShardReader(f"{tmp_path}/final/00000.tar") as final:
        assert [final.image(row) for row in range(2)] == [draft.image(0), draft.image(3)]


def test_settling_again_changes_nothing_and_another_decision_can_still_be_taken(shard, tmp_path):
    record = _settled(shard, tmp_path / "final")
    assert settle_shard(shard[0], str(tmp_path / "final"), 0, []).samples == 4
    assert _settled(shard, tmp_path / "final") == record


def test_a_shard_of_nothing_but_repeats_has_no_tar(shard, tmp_path):
    every = [Repeat(f"00000000{row}", "duplicate_image", "x") for row in range(4)]
    settle_shard(shard[0], str(tmp_path), 0, [])
    assert settle_shard(shard[0], str(tmp_path), 0, every).samples == 0
    assert not (tmp_path / "00000.tar").exists()
