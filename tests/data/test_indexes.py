"""Indexes for other readers: true, and out of img2dataset's way. `tests/readers` has the readers themselves."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import columns, manifest
from data.config import fingerprint
from data.errors import CorruptArtifact, UserError
from data.indexes import write_index
from data.manifest import Ledger, ShardRecord, Snapshot
from data.shards import ShardConfig, write_shard
from data.sources import Row
from data.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of two rows, of which the second has no sample and hence no tar."""
    rows, home = [], tmp_path / "store" / "shard" / "one"
    for number in range(6):
        path = tmp_path / f"{number}.png"
        if number not in (2, 3):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
        rows.append(Row(number, str(path), f"picture {number}", path.name))
    config = ShardConfig(image_size=8, encode_format="png", samples_per_shard=2)
    shards = tuple(write_shard(rows[2 * i : 2 * i + 2], i, str(home), config) for i in range(3))
    snapshot = Snapshot(
        stage="shard",
        version=1,
        fingerprint=fingerprint("shard", 1, {}, {}),
        config={},
        columns=("caption", "image"),
        shards=shards,
    )
    manifest.publish_snapshot(str(home), snapshot)
    return home


def test_wids_lists_every_tar_that_there_is_with_its_md5(folder: Path) -> None:
    path = Path(write_index(str(folder), "wids"))
    index = json.loads(path.read_text())
    assert (index["__kind__"], index["wids_version"]) == ("wids-shard-index-v1", 1)
    for entry, name in zip(index["shardlist"], ["00000.tar", "00002.tar"], strict=True):
        payload = (path.parent / entry["url"]).resolve().read_bytes()
        assert payload == (folder / name).read_bytes()
        assert entry["md5sum"] == hashlib.md5(payload).hexdigest()
        assert (entry["nsamples"], entry["filesize"]) == (2, len(payload))


def test_sizes_lie_where_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    assert write_index(str(folder), "sizes") == f"{folder}/_index/sizes.json"
    path = write_index(str(folder), "sizes", out=str(tmp_path / "elsewhere"))
    assert path == f"{tmp_path}/elsewhere/sizes.json"
    assert json.loads(Path(path).read_text()) == {"00000.tar": 2, "00002.tar": 2}


def test_energons_offsets_are_those_of_the_first_members_and_of_the_end(folder: Path) -> None:
    assert write_index(str(folder), "energon") == str(folder)
    with tarfile.open(folder / "00002.tar") as tar:
        starts = [member.offset for member in tar if member.name.endswith(".png")]
        assert np.fromfile(folder / "00002.tar.idx", "<u8").tolist() == [*starts, tar.offset]
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    assert info["shard_counts"] == {"00000.tar": 2, "00002.tar": 2}
    meta = json.loads((folder / ".nv-meta" / "dataset.yaml").read_text())
    assert meta["field_map"] == {"image": "png", "caption": "txt"}


def test_no_index_is_a_json_beside_the_shards_and_the_artifact_stays_sound(folder: Path) -> None:
    for kind in ("wids", "sizes", "energon"):
        write_index(str(folder), kind)
    assert {path.name for path in folder.glob("*.json")} == {f"0000{n}_stats.json" for n in range(3)}
    assert verify(str(folder)).ok


def test_the_data_set_of_a_store_is_found(folder: Path) -> None:
    assert write_index(str(folder.parents[1]), "sizes") == f"{folder}/_index/sizes.json"


@pytest.fixture
def embedded(folder: Path) -> Path:
    """Marks beside `folder`, of which those of odd rows are out."""
    home, (data,) = folder.parents[1] / "embed" / "two", manifest.snapshots(str(folder))
    records = []
    for shard in data.shards:
        if shard.samples:
            keys = [f"{shard.index:05d}{row:04d}" for row in range(2)]
            marks = columns.write_array(str(home), "kept", shard.index, np.array([True, False]))
            files = (marks, columns.write_metadata(str(home), shard.index, keys, ["text"] * 2))
            ledger = Ledger(written=1, filtered={"low_clip_score": 1})
            shared = {"index": shard.index, "samples": 2, "keys": shard.keys, "ledger": ledger}
            records.append(ShardRecord(files=files, **shared))
    name = fingerprint("embed", 1, {}, {})
    made = {"stage": "embed", "version": 1, "fingerprint": name, "config": {}, "columns": ("kept",)}
    manifest.publish_snapshot(str(home), Snapshot(**made, shards=tuple(records)))
    return home


@pytest.mark.parametrize("above", [0, 2])
def test_the_keys_of_kept_pairs_are_a_list_for_any_reader(embedded: Path, above: int) -> None:
    place = embedded if above == 0 else embedded.parents[above - 1]
    path = Path(write_index(str(place), "kept"))
    assert path == embedded / "_index" / "kept.txt"
    assert path.read_text() == "000000000\n000020000\n"
    assert verify(str(embedded.parents[1])).ok


READER = """
import sys, webdataset
kept = set(open(sys.argv[1]).read().split())
read = webdataset.WebDataset(sys.argv[2:], shardshuffle=False).select(lambda sample: sample["__key__"] in kept)
print([(sample["__key__"], sample["txt"].decode()) for sample in read])
"""


def test_webdataset_reads_the_kept_pairs_alone_by_their_keys(embedded: Path) -> None:
    """As the README has it."""
    tars = [str(tar) for tar in sorted(embedded.parents[1].glob("shard/one/*.tar"))]
    line = [sys.executable, "-c", READER, write_index(str(embedded), "kept"), *tars]
    read = subprocess.run(line, check=True, capture_output=True, text=True, timeout=120)
    assert read.stdout == "[('000000000', 'picture 0'), ('000020000', 'picture 4')]\n"


def test_keys_that_cannot_be_told_are_named_and_not_guessed(embedded: Path) -> None:
    (embedded / "metadata" / "metadata_00002.parquet").write_bytes(b"no parquet")
    with pytest.raises(CorruptArtifact, match=r"metadata_00002\.parquet is no metadata"):
        write_index(str(embedded), "kept")
    columns.write_metadata(str(embedded), 2, ["000020000"], ["text"])
    with pytest.raises(CorruptArtifact, match="shard 00002 has 1 keys and 2 marks"):
        write_index(str(embedded), "kept")


def test_the_user_is_told_what_to_give(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind tfrecord; give one of wids, sizes, energon, kept"):
        write_index(str(folder), "tfrecord")
    with pytest.raises(UserError, match="should hold one sharded data set; there is none"):
        write_index(str(tmp_path / "nowhere"), "wids")
    with pytest.raises(
        UserError, match=r"one set of embeddings made with embed\.min_clip_score; there is none"
    ):
        write_index(str(folder.parent), "kept")
    with pytest.raises(
        UserError, match="--out /elsewhere: Energon finds its index in the folder of the shards"
    ):
        write_index(str(folder), "energon", out="/elsewhere")
    made = manifest.snapshots(str(folder))[0]
    manifest.publish_snapshot(str(folder.with_name("two")), made)
    with pytest.raises(UserError, match=r"one sharded data set; there are .*one, .*two: give one of them"):
        write_index(str(folder.parent), "wids")
