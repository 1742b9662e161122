"""Manifests: nothing is finished before its snapshot lies there, and identity is content, not time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import manifest, storage
from data.errors import CorruptArtifact
from data.manifest import FileRecord, Ledger, Parent, ShardRecord, Snapshot, keys_digest

COUNTS = st.dictionaries(st.sampled_from(["too_small", "html", "truncated"]), st.integers(0, 99))
LEDGERS = st.builds(Ledger, written=st.integers(0, 99), filtered=COUNTS, failed=COUNTS)

FILE = FileRecord(path="00000.tar", bytes=3, sha256="ab" * 32)
SHARD = ShardRecord(
    index=0,
    samples=2,
    keys=keys_digest(["a", "b"]),
    files=(FILE,),
    ledger=Ledger(written=2, failed={"html": 1}),
)
SNAPSHOT = Snapshot(
    stage="shard",
    version=1,
    fingerprint="0123456789ab",
    config={"size": 64},
    columns=("caption", "image"),
    shards=(SHARD,),
    facts={"scale": 0.5},
    created="2024-01-01T00:00:00+00:00",
    seconds=1.5,
)


def test_a_snapshot_is_there_only_once_it_is_committed(tmp_path: Path) -> None:
    folder = str(tmp_path / "shard" / "key")
    assert manifest.load_snapshot(folder, SNAPSHOT.fingerprint) is None and manifest.snapshots(folder) == []
    manifest.publish_receipt(folder, SHARD)
    storage.write_bytes(storage.join(folder, "00000.tar"), b"tar")
    assert manifest.load_snapshot(folder, SNAPSHOT.fingerprint) is None and manifest.snapshots(folder) == []
    published = manifest.publish_snapshot(folder, SNAPSHOT)
    assert published == manifest.load_snapshot(folder, SNAPSHOT.fingerprint)
    assert manifest.snapshots(folder) == [published]
    assert published.folder == folder and published.digest == SNAPSHOT.digest


def test_where_an_artifact_was_written_is_not_in_its_snapshot(tmp_path: Path) -> None:
    manifest.publish_snapshot(str(tmp_path), SNAPSHOT)
    path = tmp_path / "_meta" / "snapshots" / f"{SNAPSHOT.fingerprint}.json"
    assert str(tmp_path) not in path.read_text() and '"folder"' not in path.read_text()


def test_the_draft_of_a_killed_writer_is_no_snapshot(tmp_path: Path) -> None:
    published = manifest.publish_snapshot(str(tmp_path), SNAPSHOT)
    whole = tmp_path / "_meta" / "snapshots" / f"{SNAPSHOT.fingerprint}.json"
    whole.with_name(f".tmp-0a0a0a-{whole.name}").write_bytes(whole.read_bytes()[:100])
    assert manifest.snapshots(str(tmp_path)) == [published]


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json", b"\xff\xfe", b'{"stage": "shard", "more": 1}'])
def test_a_damaged_snapshot_is_corrupt_and_a_damaged_receipt_is_unfinished_work(
    tmp_path: Path, damage: bytes
) -> None:
    folder = str(tmp_path)
    storage.write_bytes(manifest.snapshot_path(folder, "f"), damage)
    storage.write_bytes(manifest.receipt_path(folder, 3), damage)
    with pytest.raises(CorruptArtifact, match=r"f\.json is not a Snapshot"):
        manifest.load_snapshot(folder, "f")
    with pytest.raises(CorruptArtifact):
        manifest.snapshots(folder)
    assert manifest.load_receipt(folder, 3) is None


def test_a_snapshot_made_at_no_time_is_corrupt(tmp_path: Path) -> None:
    manifest.publish_snapshot(str(tmp_path), SNAPSHOT)
    path = tmp_path / "_meta" / "snapshots" / f"{SNAPSHOT.fingerprint}.json"
    path.write_text(path.read_text().replace("2024-01-01", "2024-13-01"))
    with pytest.raises(CorruptArtifact, match="is not a Snapshot"):
        manifest.load_snapshot(str(tmp_path), SNAPSHOT.fingerprint)


def test_a_cut_snapshot_is_corrupt_wherever_it_was_cut(tmp_path: Path) -> None:
    manifest.publish_snapshot(str(tmp_path), SNAPSHOT)
    path = manifest.snapshot_path(str(tmp_path), SNAPSHOT.fingerprint)
    whole = storage.read_bytes(path)
    for length in range(0, len(whole.rstrip()), 7):
        storage.write_bytes(path, whole[:length])
        with pytest.raises(CorruptArtifact):
            manifest.load_snapshot(str(tmp_path), SNAPSHOT.fingerprint)


def test_receipts_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert manifest.load_receipt(str(tmp_path), 0) is None
    manifest.publish_receipt(str(tmp_path), SHARD)
    assert manifest.load_receipt(str(tmp_path), 0) == SHARD


@pytest.mark.parametrize(
    "change", [{"created": "2030"}, {"seconds": 9.0}, {"facts": {}}, {"folder": "elsewhere"}]
)
def test_the_digest_ignores_when_and_where(change: dict) -> None:
    assert SNAPSHOT.model_copy(update=change).digest == SNAPSHOT.digest


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"config": {"size": 65}},
        {"columns": ("image",)},
        {"shards": ()},
        {"shards": (SHARD.model_copy(update={"keys": keys_digest(["b", "a"])}),)},
        {"files": (FILE,)},
        {"parents": {"data": Parent(stage="s", folder="f", fingerprint="x", digest="y")}},
    ],
)
def test_the_digest_sees_everything_else(change: dict) -> None:
    assert SNAPSHOT.model_copy(update=change).digest != SNAPSHOT.digest


def test_a_childs_digest_depends_on_what_its_parent_held_and_not_on_where_it_lay() -> None:
    parent = SNAPSHOT.as_parent()
    children = [
        SNAPSHOT.model_copy(update={"parents": {"data": parent.model_copy(update=change)}}).digest
        for change in ({}, {"folder": "moved"}, {"digest": "other"})
    ]
    assert children[0] == children[1] != children[2]


def test_a_shards_digest_is_its_keys_and_files() -> None:
    other_file = SHARD.model_copy(update={"files": (FILE.model_copy(update={"sha256": "0"}),)})
    assert SHARD.model_copy(update={"ledger": Ledger(), "index": 4}).digest == SHARD.digest
    assert other_file.digest != SHARD.digest


@given(LEDGERS, LEDGERS, LEDGERS)
def test_ledgers_add_up(one: Ledger, two: Ledger, three: Ledger) -> None:
    total = one + two + three
    assert total == one + (two + three) == three + two + one
    assert total.attempted == one.attempted + two.attempted + three.attempted
    assert total.attempted == total.written + sum(total.filtered.values()) + sum(total.failed.values())


def test_a_snapshots_ledger_and_samples_are_the_sums_over_its_shards() -> None:
    second = SHARD.model_copy(
        update={
            "index": 1,
            "samples": 5,
            "ledger": Ledger(written=5, filtered={"small": 4}, failed={"html": 2}),
        }
    )
    both = SNAPSHOT.model_copy(update={"shards": (SHARD, second)})
    assert both.samples == 7
    assert both.ledger == Ledger(written=7, filtered={"small": 4}, failed={"html": 3})
    assert Snapshot(stage="s", version=1, fingerprint="f", config={}).ledger == Ledger()


def test_a_files_record_is_its_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    digest = hashlib.sha256(b"12345").hexdigest()
    expected = FileRecord(path="a.bin", bytes=5, sha256=digest, blocks="cbf53a1c")
    assert manifest.file_record(str(tmp_path), "a.bin") == expected


def test_the_keys_digest_sees_order_and_boundaries() -> None:
    assert len({keys_digest(k) for k in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5


def test_a_shards_file_is_found_by_its_prefix() -> None:
    assert SHARD.file("00000.t") == FILE
    with pytest.raises(AssertionError, match="0 files under 'vae'"):
        SHARD.file("vae")
