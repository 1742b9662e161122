"""Verifying: a sound artifact has no problem, and whatever was done to one is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import columns, manifest, storage
from data.errors import UserError
from data.manifest import FileRecord, ShardRecord, Snapshot
from data.shards import ShardConfig, write_shard
from data.sources import Row
from data.verify import verify

CONFIG = ShardConfig(image_size=8, encode_format="png", samples_per_shard=4)


def _shards(folder: Path, pictures: Path) -> Snapshot:
    """Two shards of four rows, of which the second has one without a file and one without a caption."""
    pictures.mkdir()
    rows = []
    for i in range(8):
        path, rng = pictures / f"{i}.png", np.random.default_rng(i)
        if i != 5:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        rows.append(Row(i, str(path), None if i == 6 else f"picture {i}", path.name))
    records = tuple(write_shard(rows[4 * i : 4 * i + 4], i, str(folder), CONFIG) for i in range(2))
    snapshot = Snapshot(
        stage="shard", version=1, fingerprint="aaaa", config={}, columns=("caption", "image"), shards=records
    )
    return manifest.publish_snapshot(str(folder), snapshot)


def _embeddings(folder: Path, data: Snapshot, shards: tuple[ShardRecord, ...] | None = None) -> Snapshot:
    """One embedding of each sample of `data`."""
    records = []
    for shard in data.shards:
        values = np.random.default_rng(shard.index).normal(size=(shard.samples, 3))
        file = columns.write_array(str(folder), "img_emb", shard.index, values)
        records.append(shard.model_copy(update={"files": (file,), "parents": {"data": shard.digest}}))
    snapshot = Snapshot(
        stage="embed",
        version=1,
        fingerprint="bbbb",
        config={},
        columns=("img_emb",),
        parents={"data": data.as_parent()},
        shards=tuple(records) if shards is None else shards,
    )
    return manifest.publish_snapshot(str(folder), snapshot)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """store/shard/one and store/embed/two."""
    data = _shards(tmp_path / "store" / "shard" / "one", tmp_path / "pictures")
    _embeddings(tmp_path / "store" / "embed" / "two", data)
    return tmp_path / "store"


@pytest.mark.parametrize("below", [".", "..", "shard", "shard/one", "embed/two"])
def test_a_sound_artifact_has_no_problem_from_wherever_one_looks(store: Path, below: str) -> None:
    verdict = verify(str((store / below).resolve()))
    assert verdict.ok and verdict.problems == ()
    rows = (0, 0, 0, 0) if below == "embed/two" else (8, 6, 0, 2)
    assert (verdict.attempted, verdict.written, verdict.filtered, verdict.failed) == rows


def _flip(path: Path, at: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _reorder(path: Path) -> None:
    np.save(path, np.load(path, allow_pickle=False)[::-1].copy())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def _folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit of a tar": ("shard/one/00000.tar", lambda p: _flip(p, 700), "bytes changed"),
    "a flipped bit of a parquet": ("shard/one/00001.parquet", lambda p: _flip(p, 20), "bytes changed"),
    "a flipped bit of an array": (
        "embed/two/img_emb/img_emb_00000.npy",
        lambda p: _flip(p, -1),
        "bytes changed",
    ),
    "a flipped bit of the stats": ("shard/one/00000_stats.json", lambda p: _flip(p, 3), "bytes changed"),
    "a cut tar": ("shard/one/00000.tar", _truncate, "its manifest says"),
    "an empty tar": ("shard/one/00000.tar", lambda p: p.write_bytes(b""), "has 0 bytes"),
    "a missing tar": ("shard/one/00001.tar", Path.unlink, "is missing"),
    "a missing parquet": ("shard/one/00001.parquet", Path.unlink, "is missing"),
    "a missing array": ("embed/two/img_emb/img_emb_00001.npy", Path.unlink, "is missing"),
    "exchanged parquets": (
        "shard/one/00000.parquet",
        lambda p: _swap(p, p.with_name("00001.parquet")),
        "its manifest says",
    ),
    "exchanged tars": ("shard/one/00000.tar", lambda p: _swap(p, p.with_name("00001.tar")), "keys or order"),
    "a reordered array": ("embed/two/img_emb/img_emb_00000.npy", _reorder, "bytes changed"),
    "a file that became a folder": (
        "embed/two/img_emb/img_emb_00000.npy",
        _folder_in_place,
        "cannot be read",
    ),
    "a damaged snapshot": ("embed/two/_meta/snapshots/bbbb.json", _truncate, "is not a Snapshot"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(store: Path, name: str) -> None:
    path, damage, problem = DAMAGE[name]
    damage(store / path)
    verdict = verify(str(store))
    assert not verdict.ok
    found = [p for p in verdict.problems if problem in p.problem]
    named = path.split("/_meta")[0]
    assert any(p.uri == str(store / named) for p in found), verdict.problems
    assert verdict.attempted == (8 if (store / "shard/one/00000.parquet").exists() else 0)


def test_a_damaged_parent_is_told_and_does_not_stop_the_search(store: Path) -> None:
    (store / "shard/one/_meta/snapshots/aaaa.json").write_bytes(b"{}")
    (store / "embed/two/img_emb/img_emb_00001.npy").unlink()
    problems = {problem.uri: problem.problem for problem in verify(str(store)).problems}
    assert "is not a Snapshot" in problems[str(store / "shard/one")]
    assert "its data cannot be held against it" in problems[str(store / "embed/two")]
    assert "is missing" in problems[str(store / "embed/two/img_emb/img_emb_00001.npy")]


def test_a_parent_that_was_remade_otherwise_is_told(store: Path) -> None:
    data = manifest.snapshots(str(store / "shard" / "one"))[0]
    manifest.publish_snapshot(data.folder, data.model_copy(update={"config": {"image_size": 16}}))
    problems = verify(str(store / "embed")).problems
    assert ["was made from another data" in p.problem for p in problems] == [True]


def test_a_parent_that_was_cleaned_away_is_no_problem(store: Path) -> None:
    shutil.rmtree(store / "shard")
    assert verify(str(store)).ok


def test_a_column_that_is_not_row_aligned_is_told(store: Path) -> None:
    data = manifest.snapshots(str(store / "shard" / "one"))[0]
    made = manifest.snapshots(str(store / "embed" / "two"))[0]
    reordered = made.shards[0].model_copy(update={"keys": manifest.keys_digest(["b", "a"])})
    _embeddings(store / "embed" / "two", data, (reordered, made.shards[1]))
    problems = verify(str(store)).problems
    assert len(problems) == 1 and "not row-aligned with shard 00000" in problems[0].problem


def test_a_record_that_disagrees_with_its_intact_tar_is_told(store: Path) -> None:
    data = manifest.snapshots(str(store / "shard" / "one"))[0]
    wrong = data.shards[0].model_copy(update={"keys": manifest.keys_digest(["a"])})
    manifest.publish_snapshot(data.folder, data.model_copy(update={"shards": (wrong, data.shards[1])}))
    problems = [p.problem for p in verify(data.folder).problems]
    assert len(problems) == 1 and "keys or order are not the 4 of its manifest" in problems[0]


def test_files_that_are_in_no_shard_are_checked_too(tmp_path: Path) -> None:
    file = FileRecord(path="unet/model.safetensors", bytes=1, sha256="0")
    snapshot = Snapshot(stage="vae", version=1, fingerprint="cccc", config={}, files=(file,))
    manifest.publish_snapshot(str(tmp_path), snapshot)
    assert [p.problem for p in verify(str(tmp_path)).problems] == ["is missing"]
    storage.write_bytes(str(tmp_path / file.path), b"x")
    assert "bytes changed" in verify(str(tmp_path)).problems[0].problem


@pytest.mark.parametrize("below", [".", "absent", "a file"])
def test_where_nothing_lies_the_user_is_told_what_to_give(tmp_path: Path, below: str) -> None:
    (tmp_path / "a file").write_bytes(b"x")
    with pytest.raises(UserError, match="holds nothing that Darkroom made: give a root"):
        verify(str(tmp_path / below))
