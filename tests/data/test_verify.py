"""Verifying: a sound artifact has no problem, and whatever was done to one is found and named, with the bytes it hit."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import columns, growth, manifest, storage
from data.checksums import BLOCK
from data.config import fingerprint
from data.errors import UserError
from data.growth import FAILED, WRITTEN
from data.manifest import Ledger, ShardRecord, Snapshot, file_record
from data.shards import ShardConfig, write_shard
from data.sources import Row
from data.tars import ShardReader
from data.verify import Verdict, verify

CONFIG = ShardConfig(image_size=8, encode_format="png", samples_per_shard=4)


def published(folder: Path, **fields: Any) -> Snapshot:
    """Commits a snapshot under the name that a plan would give it."""
    fields = {"version": 1, "config": {}, "parents": {}} | fields
    inputs = {role: parent.fingerprint for role, parent in fields["parents"].items()}
    name = fingerprint(fields["stage"], fields["version"], fields["config"], inputs)
    return manifest.publish_snapshot(str(folder), Snapshot(fingerprint=name, **fields))


def rows_of(pictures: Path, start: int, count: int) -> list[Row]:
    """Rows of which number 5 has no file and number 6 no caption."""
    pictures.mkdir(exist_ok=True)
    rows = []
    for i in range(start, start + count):
        path, rng = pictures / f"{i}.png", np.random.default_rng(i)
        if i != 5:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        rows.append(Row(i, str(path), None if i == 6 else f"picture {i}", path.name))
    return rows


def shard_of(folder: Path, rows: list[Row], index: int) -> ShardRecord:
    record = write_shard(rows[4 * index : 4 * index + 4], index, str(folder), CONFIG)
    files = tuple(file_record(str(folder), file.path) for file in record.files)
    record = record.model_copy(update={"files": files, "parents": {"source": f"rows of {index}"}})
    manifest.publish_receipt(str(folder), record)
    return record


def shards(folder: Path, pictures: Path) -> Snapshot:
    """Two shards of four rows each."""
    rows = rows_of(pictures, 0, 8)
    records = tuple(shard_of(folder, rows, index) for index in range(2))
    return published(folder, stage="shard", columns=("caption", "image"), shards=records)


def embeddings(folder: Path, data: Snapshot) -> Snapshot:
    """An embedding, hidden states of as many tokens as the row's number, and the metadata of each sample of `data`."""
    records = []
    for shard in data.shards:
        rng = np.random.default_rng(shard.index)
        with ShardReader(storage.join(data.folder, f"{shard.index:05d}.tar")) as reader:
            files = (
                columns.write_array(str(folder), "img_emb", shard.index, rng.normal(size=(shard.samples, 3))),
                *columns.write_ragged(
                    str(folder),
                    "text_hidden",
                    shard.index,
                    [rng.normal(size=(n + 1, 3)) for n in range(shard.samples)],
                ),
                columns.write_metadata(str(folder), shard.index, reader.keys, ["text"] * shard.samples),
            )
        records.append(
            ShardRecord(
                index=shard.index,
                samples=shard.samples,
                keys=shard.keys,
                files=files,
                parents={"data": shard.digest},
            )
        )
        manifest.publish_receipt(str(folder), records[-1])
    return published(
        folder,
        stage="embed",
        columns=("img_emb", "text_hidden"),
        parents={"data": data.as_parent()},
        shards=tuple(records),
    )


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """store/shard/one and store/embed/two."""
    data = shards(tmp_path / "store" / "shard" / "one", tmp_path / "pictures")
    embeddings(tmp_path / "store" / "embed" / "two", data)
    return tmp_path / "store"


def told(verdict: Verdict, store: Path) -> dict[str, str]:
    """Path under the store -> what is wrong there."""
    assert not verdict.ok
    return {problem.uri.removeprefix(f"{store}/"): problem.problem for problem in verdict.problems}


@pytest.mark.parametrize("below", [".", "..", "shard", "shard/one", "embed/two"])
def test_a_sound_artifact_has_no_problem_from_wherever_one_looks(store: Path, below: str) -> None:
    verdict = verify(str((store / below).resolve()))
    assert verdict.ok and verdict.problems == ()
    rows = (0, 0, 0, 0) if below == "embed/two" else (8, 6, 0, 2)
    assert (verdict.attempted, verdict.written, verdict.filtered, verdict.failed) == rows


def test_what_was_checked_is_told_by_stage(store: Path) -> None:
    verdict = verify(str(store))
    found = {checked.stage: checked for checked in verdict.checked}
    assert list(found) == ["embed", "shard"] and "checked" not in verdict.model_dump(mode="json")
    for stage, count in (("shard", 6), ("embed", 8)):
        files = [p for p in (store / stage).rglob("*") if p.is_file() and "_meta" not in p.parts]
        told = found[stage]
        assert (told.artifacts, told.shards, told.samples, told.files) == (1, 2, 6, count)
        assert len(files) == told.files and sum(p.stat().st_size for p in files) == told.bytes
        assert told.left_out == 0


def test_what_a_clip_score_leaves_out_is_counted_apart_from_the_rows_of_the_source(store: Path) -> None:
    (made,) = manifest.snapshots(str(store / "embed" / "two"))
    marks = [np.arange(shard.samples) > 0 for shard in made.shards]
    records = [
        shard.model_copy(
            update={
                "files": (*shard.files, columns.write_array(made.folder, "kept", shard.index, kept)),
                "ledger": Ledger(written=int(kept.sum()), filtered={"low_clip_score": 1}),
            }
        )
        for shard, kept in zip(made.shards, marks, strict=True)
    ]
    for record in records:
        manifest.publish_receipt(made.folder, record)
    marked = made.model_copy(update={"shards": tuple(records), "columns": (*made.columns, "kept")})
    manifest.publish_snapshot(made.folder, marked)
    verdict = verify(str(store))
    assert verdict.ok and (verdict.attempted, verdict.filtered) == (8, 0)
    assert [checked.left_out for checked in verdict.checked] == [2, 0]
    short = columns.write_array(made.folder, "kept", 0, marks[0][1:])
    records[0] = records[0].model_copy(update={"files": (*made.shards[0].files, short)})
    manifest.publish_receipt(made.folder, records[0])
    manifest.publish_snapshot(made.folder, marked.model_copy(update={"shards": tuple(records)}))
    assert told(verify(str(store)), store) == {
        "embed/two/kept/kept_00000.npy": f"has {len(marks[0]) - 1} rows for {len(marks[0])} samples"
    }


def flip(path: Path, at: int) -> None:
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def reorder(path: Path) -> None:
    np.save(path, np.load(path, allow_pickle=False)[::-1].copy())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1024])


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_shard(path: Path) -> None:
    """A file with its receipt, copied over those of its neighbour."""
    shutil.copy(path.with_name("img_emb_00001.npy"), path)
    receipts = path.parents[1] / "_meta" / "receipts"
    shutil.copy(receipts / "00001.json", receipts / "00000.json")


def other_config(path: Path) -> None:
    path.write_text(path.read_text().replace('"config": {}', '"config": {"image_size": 9}'))


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit of a picture": (
        "shard/one/00000.tar",
        lambda p: flip(p, 600),
        "bit 0 of byte 600 flipped: 000000000.png",
    ),
    "a flipped bit of a header": (
        "shard/one/00000.tar",
        lambda p: flip(p, 3),
        "bit 0 of byte 3 flipped: the header before 000000000.json",
    ),
    "a flipped bit of a parquet": (
        "shard/one/00001.parquet",
        lambda p: flip(p, 20),
        "bit 0 of byte 20 flipped",
    ),
    "a flipped bit of an array": (
        "embed/two/img_emb/img_emb_00000.npy",
        lambda p: flip(p, 128 + 7),
        "row 1 ",
    ),
    "a flipped bit of a ragged column": (
        "embed/two/text_hidden/text_hidden_00000.npy",
        lambda p: flip(p, 128 + 6 * 3 + 1),
        "bit 0 of byte 147 flipped: row 2 ",
    ),
    "a flipped bit of the stats": (
        "shard/one/00000_stats.json",
        lambda p: flip(p, 3),
        "bit 0 of byte 3 flipped",
    ),
    "a cut tar": ("shard/one/00000.tar", cut, "its manifest says"),
    "an empty tar": ("shard/one/00000.tar", lambda p: p.write_bytes(b""), "has 0 bytes"),
    "a missing tar": ("shard/one/00001.tar", Path.unlink, "is missing"),
    "a missing parquet": ("shard/one/00001.parquet", Path.unlink, "is missing"),
    "a missing array": ("embed/two/img_emb/img_emb_00001.npy", Path.unlink, "is missing"),
    "exchanged parquets": (
        "shard/one/00000.parquet",
        lambda p: exchange(p, p.with_name("00001.parquet")),
        "its manifest says",
    ),
    "exchanged tars": (
        "shard/one/00000.tar",
        lambda p: exchange(p, p.with_name("00001.tar")),
        "its manifest says",
    ),
    "exchanged metadata": (
        "embed/two/metadata/metadata_00000.parquet",
        lambda p: exchange(p, p.with_name("metadata_00001.parquet")),
        "its manifest says",
    ),
    "a reordered array": (
        "embed/two/img_emb/img_emb_00000.npy",
        reorder,
        "bytes 0 to 151 changed: its header, rows 0 to 3",
    ),
    "an array of another shard": (
        "embed/two/img_emb/img_emb_00000.npy",
        of_another_shard,
        "its manifest says",
    ),
    "a receipt of another shard": (
        "embed/two/_meta/receipts/00000.json",
        lambda p: shutil.copy(p.with_name("00001.json"), p),
        "is the receipt of shard 00001",
    ),
    "a cut receipt": ("embed/two/_meta/receipts/00000.json", cut, "cannot be read"),
    "a file that became a folder": ("embed/two/img_emb/img_emb_00000.npy", folder_in_place, "cannot be read"),
    "a cut snapshot": ("embed/two/_meta/snapshots/*.json", cut, "is not a Snapshot"),
    "a snapshot with another config": (
        "embed/two/_meta/snapshots/*.json",
        other_config,
        "is not what its name stands for",
    ),
    "a tar that nobody made": (
        "shard/one/00007.tar",
        lambda p: p.write_bytes(b"tar"),
        "belongs to no snapshot and no receipt",
    ),
    "an array that nobody made": (
        "embed/two/img_emb/img_emb_00007.npy",
        lambda p: p.write_bytes(b"npy"),
        "belongs to no snapshot and no receipt",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(store: Path, name: str) -> None:
    pattern, damage, problem = DAMAGE[name]
    path = next(store.glob(pattern), store / pattern)
    damage(path)
    assert problem in told(verify(str(store)), store)[str(path.relative_to(store))]


def test_a_file_that_a_killed_writer_left_is_no_problem(store: Path) -> None:
    (store / "shard/one/.tmp-00007.tar").write_bytes(b"half")
    assert verify(str(store)).ok


def test_what_a_run_in_progress_has_written_is_no_problem(store: Path) -> None:
    (store / "shard/one/00007.tar").write_bytes(b"whole")
    (store / "shard/one/_meta/lease.json").write_bytes(b"{}")
    assert verify(str(store)).ok


def test_a_shard_that_only_a_receipt_names_is_checked(store: Path, tmp_path: Path) -> None:
    folder = store / "shard" / "one"
    shard_of(folder, rows_of(tmp_path / "pictures", 0, 12), 2)
    assert verify(str(store)).ok
    flip(folder / "00002.tar", 600)
    assert told(verify(str(store)), store).keys() == {"shard/one/00002.tar"}


@pytest.mark.parametrize("wrong", ["keys", "samples", "ledger"])
def test_a_record_that_disagrees_with_its_intact_files_is_told(store: Path, wrong: str) -> None:
    data = manifest.snapshots(str(store / "shard" / "one"))[0]
    other = {
        "keys": manifest.keys_digest(["a"]),
        "samples": 3,
        "ledger": Ledger(written=4, failed={"html": 1}),
    }
    changed = data.shards[0].model_copy(update={wrong: other[wrong]})
    manifest.publish_snapshot(data.folder, data.model_copy(update={"shards": (changed, data.shards[1])}))
    where = "00000.parquet" if wrong == "ledger" else "00000.tar"
    assert (
        "manifest" in (problem := told(verify(data.folder), store)[f"shard/one/{where}"])
        or "ledger" in problem
    )


def rewritten(store: Path, path: str, change: Callable[[Path], None]) -> None:
    """Changes a file and makes every manifest agree with it: what is wrong then is only seen by reading the file."""
    folder = store / "/".join(path.split("/")[:2])
    made = manifest.snapshots(str(folder))[0]
    change(store / path)
    records = []
    for shard in made.shards:
        files = tuple(file_record(str(folder), file.path) for file in shard.files)
        records.append(shard.model_copy(update={"files": files}))
        manifest.publish_receipt(str(folder), records[-1])
    manifest.publish_snapshot(str(folder), made.model_copy(update={"shards": tuple(records)}))


def drop_row(path: Path) -> None:
    np.save(path, np.load(path, allow_pickle=False)[:-1])


def reverse_table(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.take(list(reversed(range(len(table))))), path)


def one_more_success(path: Path) -> None:
    table = pq.read_table(path).to_pylist()
    lines = [line | {"status": "success", "error_class": None} for line in table]
    pq.write_table(pq.read_table(path).from_pylist(lines), path)


def wrong_boundaries(path: Path) -> None:
    np.save(path, np.load(path, allow_pickle=False) + 1)


def halve_last_sample(path: Path) -> None:
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, payload in members[:-1]:
            tar.addfile(member, io.BytesIO(payload))


@pytest.mark.parametrize(
    ("path", "change", "problem"),
    [
        ("shard/one/00001.tar", halve_last_sample, "has no txt"),
        ("embed/two/img_emb/img_emb_00000.npy", drop_row, "has 3 rows for 4 samples"),
        ("embed/two/metadata/metadata_00000.parquet", reverse_table, "keys or order are not the 4"),
        ("shard/one/00000.parquet", reverse_table, "in another order"),
        ("shard/one/00001.parquet", one_more_success, "other outcomes than its ledger"),
    ],
)
def test_files_that_disagree_with_each_other_are_told_though_every_digest_is_right(
    store: Path, path: str, change: Callable[[Path], None], problem: str
) -> None:
    rewritten(store, path, change)
    assert problem in told(verify(str(store)), store)[path]


def test_row_boundaries_that_do_not_fit_are_told(store: Path) -> None:
    rewritten(store, "embed/two/text_hidden_offsets/text_hidden_offsets_00000.npy", wrong_boundaries)
    found = told(verify(str(store)), store)
    assert "does not divide" in found["embed/two/text_hidden/text_hidden_00000.npy"]


def test_one_key_in_two_shards_is_told(store: Path) -> None:
    folder = store / "shard" / "one"
    made = manifest.snapshots(str(folder))[0]
    shutil.copy(folder / "00000.tar", folder / "00002.tar")
    twin = made.shards[0].model_copy(update={"index": 2, "files": (file_record(str(folder), "00002.tar"),)})
    manifest.publish_snapshot(str(folder), made.model_copy(update={"shards": (*made.shards, twin)}))
    assert "has 4 keys that 00000.tar has too" in told(verify(str(folder)), store)["shard/one/00002.tar"]


def test_a_stale_column_is_told(store: Path, tmp_path: Path) -> None:
    """The shards were written anew with other pictures, and every manifest of theirs is right."""
    rows = rows_of(tmp_path / "other pictures", 100, 8)
    folder = store / "shard" / "one"
    data = manifest.snapshots(str(folder))[0]
    records = tuple(shard_of(folder, rows, index) for index in range(2))
    manifest.publish_snapshot(str(folder), data.model_copy(update={"shards": records}))
    found = told(verify(str(store)), store)
    assert "was made from another data" in found["embed/two"]
    assert "is stale" in found["embed/two/img_emb/img_emb_00000.npy"]


def test_a_column_that_is_not_row_aligned_is_told(store: Path) -> None:
    made = manifest.snapshots(str(store / "embed" / "two"))[0]
    reordered = made.shards[0].model_copy(update={"keys": manifest.keys_digest(["b", "a"])})
    manifest.publish_receipt(made.folder, reordered)
    manifest.publish_snapshot(made.folder, made.model_copy(update={"shards": (reordered, made.shards[1])}))
    found = told(verify(str(store)), store)
    assert "not row-aligned with shard 00000" in found["embed/two/img_emb/img_emb_00000.npy"]


def test_a_column_without_one_of_the_shards_is_told(store: Path) -> None:
    made = manifest.snapshots(str(store / "embed" / "two"))[0]
    manifest.publish_snapshot(made.folder, made.model_copy(update={"shards": made.shards[:1]}))
    assert "has no shard 00001, which" in told(verify(str(store)), store)["embed/two"]


def test_a_damaged_parent_is_told_and_does_not_stop_the_search(store: Path) -> None:
    path = next((store / "shard/one/_meta/snapshots").iterdir())
    path.write_bytes(b"{}")
    (store / "embed/two/img_emb/img_emb_00001.npy").unlink()
    found = told(verify(str(store)), store)
    assert "is not a Snapshot" in found[str(path.relative_to(store))]
    assert "its data cannot be held against it" in found["embed/two"]
    assert "is missing" in found["embed/two/img_emb/img_emb_00001.npy"]


def test_a_parent_that_was_cleaned_away_is_no_problem(store: Path) -> None:
    shutil.rmtree(store / "shard")
    assert verify(str(store)).ok


def test_a_store_that_was_moved_is_held_against_itself(store: Path) -> None:
    moved = store.with_name("elsewhere")
    store.rename(moved)
    assert verify(str(moved)).ok
    rewritten(moved, "shard/one/00000_stats.json", lambda p: p.write_text("{}"))
    assert "was made from another data" in told(verify(str(moved)), moved)["embed/two"]


def state(
    folder: Path, records: tuple[ShardRecord, ...], known: growth.KnownRows, after: str = ""
) -> Snapshot:
    """Commits one state of a data set that grows."""
    config = {"after": after}
    return published(
        folder,
        stage="shard",
        config=config,
        columns=("caption", "image"),
        shards=records,
        files=(growth.save(str(folder), fingerprint("shard", 1, config, {}), known),),
        superseded=known.superseded,
        facts={"reasons": list(known.reasons)},
    )


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """Two shards, and behind them a third of three new rows and of the one without a file, which has one now."""
    folder, pictures = tmp_path / "store/shard/one", tmp_path / "pictures"
    rows, ids = rows_of(pictures, 0, 8), np.arange(11, dtype=np.uint64)
    records = tuple(shard_of(folder, rows, index) for index in range(2))
    outcomes = [(WRITTEN, "")] * 5 + [(FAILED, "missing_image"), (FAILED, "no_caption"), (WRITTEN, "")]
    change = growth.growth(nothing := growth.nothing_known(), ids[:8])
    assert change is not None
    known = growth.grown(nothing, change, ids[:8], outcomes)
    first = state(folder, records, known)
    change = growth.growth(known, ids, [5])
    assert change is not None
    records += (shard_of(folder, [*rows, *rows_of(pictures, 8, 4)], 2),)
    state(folder, records, growth.grown(known, change, ids, [(WRITTEN, "")] * 4), first.fingerprint)
    return folder


def test_of_a_data_set_that_grew_the_newest_state_counts(grown: Path) -> None:
    verdict = verify(str(grown))
    assert verdict.ok
    assert (verdict.attempted, verdict.written, verdict.failed) == (11, 10, 1)


def test_a_damaged_shard_of_several_states_is_told_once(grown: Path) -> None:
    flip(grown / "00000.tar", 600)
    assert [problem.path for problem in verify(str(grown)).problems] == ["00000.tar"]


def test_rows_that_do_not_fit_the_shards_are_told(grown: Path) -> None:
    newest = max(manifest.snapshots(str(grown)), key=lambda s: len(s.shards))
    path = growth.rows_path(newest.fingerprint)
    np.save(grown / path, growth.load(newest).rows[:-1])
    files = (file_record(str(grown), path),)
    manifest.publish_snapshot(str(grown), newest.model_copy(update={"files": files}))
    (problem,) = verify(str(grown)).problems
    assert problem.path == path
    assert problem.problem == "lists 11 rows, 9 of them written; its shards attempted 12 and wrote 10"


def test_two_states_that_disagree_about_a_shard_are_told(grown: Path) -> None:
    newest = max(manifest.snapshots(str(grown)), key=lambda s: len(s.shards))
    other = newest.shards[0].model_copy(update={"keys": manifest.keys_digest(["a"])})
    shards = (other, *newest.shards[1:])
    manifest.publish_snapshot(str(grown), newest.model_copy(update={"shards": shards}))
    found = told(verify(str(grown)), grown)
    assert (
        "has another shard 00000 than the earlier state"
        in found[f"_meta/snapshots/{newest.fingerprint}.json"]
    )


def test_files_that_are_in_no_shard_are_checked_and_the_wrong_mib_is_named(tmp_path: Path) -> None:
    payload = bytearray(np.random.default_rng(0).bytes(3 * BLOCK + 5))
    storage.write_bytes(f"{tmp_path}/unet/model.bin", bytes(payload))
    published(tmp_path, stage="vae", files=(file_record(str(tmp_path), "unet/model.bin"),))
    assert verify(str(tmp_path)).ok

    def problem() -> str:
        (found,) = verify(str(tmp_path)).problems
        assert found.uri == f"{tmp_path}/unet/model.bin"
        return found.problem

    path = tmp_path / "unet/model.bin"
    changed = payload.copy()
    changed[BLOCK + 10 : BLOCK + 20] = bytes(10)
    path.write_bytes(changed)
    assert "bytes 1048576 to 2097151 changed" in problem()
    changed[3 * BLOCK :] = bytes(5)
    path.write_bytes(changed)
    assert "bytes 1048576 to 2097151, 3145728 to 3145732 changed" in problem()
    path.write_bytes(payload[: 2 * BLOCK + 9])
    assert (
        problem() == "has 2097161 bytes, its manifest says 3145733; the first 2097152 bytes are as recorded"
    )
    path.unlink()
    assert problem() == "is missing"


def test_a_record_without_blocks_still_finds_a_flipped_bit(store: Path) -> None:
    folder = store / "shard" / "one"
    made = manifest.snapshots(str(folder))[0]
    bare = [
        shard.model_copy(update={"files": tuple(f.model_copy(update={"blocks": ""}) for f in shard.files)})
        for shard in made.shards
    ]
    for shard in bare:
        manifest.publish_receipt(str(folder), shard)
    manifest.publish_snapshot(str(folder), made.model_copy(update={"shards": tuple(bare)}))
    assert verify(str(folder)).ok
    flip(folder / "00000.tar", 600)
    assert "bytes changed: SHA-256 is" in told(verify(str(folder)), store)["shard/one/00000.tar"]


def run_record(root: Path, *uris: str) -> Path:
    run = root / "demo-1234"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run": run.name, "stages": [{"uri": uri} for uri in uris]}))
    return run


def test_a_run_is_verified_by_the_artifacts_that_its_record_names(store: Path) -> None:
    run = run_record(store.parent, str(store / "embed/two"))
    assert verify(str(run)).ok and verify(str(run)).attempted == 0
    flip(store / "shard/one/00000.tar", 600)
    assert verify(str(run)).ok
    flip(store / "embed/two/img_emb/img_emb_00000.npy", 140)
    assert list(told(verify(str(run)), store)) == ["embed/two/img_emb/img_emb_00000.npy"]


def test_a_run_whose_artifact_is_gone_says_so_from_the_run_and_from_the_root(store: Path) -> None:
    run = run_record(store.parent, str(store / "embed/two"))
    shutil.rmtree(store / "embed")
    for place in (run, store.parent):
        assert "is missing" in told(verify(str(place)), store)["embed/two"]
    (run / "run.json").write_text("{")
    (problem,) = verify(str(run)).problems
    assert problem.uri == f"{run}/run.json" and "is no record of a run" in problem.problem


def test_progress_ends_at_the_bytes_that_there_are(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(str(store), lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


def test_what_repair_needs_to_know_is_not_printed(store: Path) -> None:
    (store / "shard/one/00001.tar").unlink()
    (problem,) = verify(str(store)).problems
    assert (problem.path, problem.shard) == ("00001.tar", 1)
    assert problem.model_dump(mode="json").keys() == {"uri", "problem"}


@pytest.mark.parametrize("below", [".", "absent", "a file"])
def test_where_nothing_lies_the_user_is_told_what_to_give(tmp_path: Path, below: str) -> None:
    (tmp_path / "a file").write_bytes(b"x")
    with pytest.raises(UserError, match="holds nothing that Darkroom made: give a root"):
        verify(str(tmp_path / below))
