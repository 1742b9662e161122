"""`darkroom prepare` under faults: whatever dies, fills, vanishes or stutters, it ends with the bytes of an undisturbed run."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import growth, manifest, sources
from data.manifest import Snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from flows.assignments import edited
from flows.graph import prepare_nodes
from flows.plan import Plan, make_plan
from flows.recipes import prepare, with_data
from flows.runs import spec_of

sys.path.insert(0, str(Path(__file__).parent))
from artifacts import held
from command_lines import command
from processes import finish, kill, launch, open_files, wait_for, workers_below
from stuttering import FAULTS, stuttering

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

PICTURES, SHARDS = 60, 10
PAGE = 4096
"""Bytes that a file on a tmpfs takes at least."""
SETTINGS = {
    "shard.samples_per_shard": PICTURES // SHARDS,
    "shard.image_size": 256,
    "shard.encode_format": "png",
    "fanout.stall_seconds": 60,  # a shard takes a second: none for this long is a hang
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of noise, large enough that a shard of six takes a good part of a second."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    for number in range(PICTURES):
        picture = Image.fromarray(np.roll(noise, 7 * number, axis=1))
        picture.save(folder / f"{number:02d}.png", compress_level=0)
        (folder / f"{number:02d}.txt").write_text(f"noise {number} \u2603")
    return folder


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one worker makes of them when nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    finish(start(pictures, root, workers=1))
    found = held(root, "shard")
    assert len([name for name in found if name.endswith(".tar")]) == SHARDS
    return found


def start(source: Path, root: object, *, workers: int, **variables: str) -> subprocess.Popen[str]:
    """`darkroom prepare` in a process group of its own."""
    settings = SETTINGS | {"fanout.num_workers": workers}
    return launch(command("prepare", str(source), "--json", root=root, settings=settings), **variables)  # type: ignore[arg-type]


def start_stage(source: Path, root: Path, *options: str, workers: int) -> subprocess.Popen[str]:
    """The one stage of it by its spec, as a launcher starts it: without Prefect, which saves a few seconds."""
    plan = planned(source, root, {"fanout.num_workers": workers})
    (root / "spec.json").write_text(spec_of(plan, plan.stages[0]).model_dump_json())
    return launch([sys.executable, "-m", "stages", str(root / "spec.json"), *options])


def planned(source: Path, root: object, settings: Mapping[str, Any] | None = None) -> Plan:
    recipe = edited(
        prepare(), [f"{path}={value}" for path, value in (SETTINGS | dict(settings or {})).items()]
    )
    recipe = with_data(recipe, str(source))
    return make_plan(recipe, prepare_nodes(recipe), str(root))


def receipts(root: Path) -> list[Path]:
    return list(root.glob("store/shard/*/_meta/receipts/0*.json"))


def drafts(root: Path) -> list[Path]:
    return list(root.glob("store/shard/**/.tmp-*"))


# --- processes -----------------------------------------------------------------------------------------------------


def writing(ancestor: int) -> int | None:
    """The pid of a worker below the process `ancestor` that has the draft of a shard open; it is stopped there."""
    for worker in workers_below(ancestor):
        os.kill(worker, signal.SIGSTOP)
        if any(".tmp-" in file and file.endswith(".tar") for file in open_files(worker)):
            return worker
        os.kill(worker, signal.SIGCONT)
    return None


def test_a_run_killed_twice_with_all_its_processes_ends_with_the_bytes_of_one_worker(
    pictures, undisturbed, tmp_path
):
    kept: dict[Path, int] = {}
    for wanted in (1, 3):
        run = start(pictures, tmp_path, workers=4)
        wait_for(lambda wanted=wanted: len(receipts(tmp_path)) >= wanted, run)
        kill(run)
        assert wanted <= len(receipts(tmp_path)) < SHARDS, "it was killed in the middle of its work"
        kept |= {path: path.stat().st_mtime_ns for path in receipts(tmp_path)}
    finish(start(pictures, tmp_path, workers=4))
    assert held(tmp_path, "shard") == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing was made twice"


@pytest.fixture(scope="module")
def survived(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that lost a worker in the middle of a shard."""
    root = tmp_path_factory.mktemp("survived")
    run = start_stage(pictures, root, workers=2)
    os.kill(wait_for(lambda: writing(run.pid), run), signal.SIGKILL)
    finish(run)
    return root


def test_a_worker_killed_in_the_middle_of_a_shard_changes_no_byte(survived, undisturbed):
    assert held(survived, "shard") == undisturbed


def test_the_draft_of_a_killed_worker_does_not_stay(survived):
    assert drafts(survived) == []


def test_a_node_killed_in_the_middle_of_a_shard_changes_no_byte(pictures, undisturbed, tmp_path, nodes):
    (node,) = nodes.worker_nodes
    raylet = node.all_processes["raylet"][0].process
    run = start_stage(pictures, tmp_path, f"--address={nodes.address}", workers=2)
    worker = wait_for(lambda: writing(raylet.pid), run)
    os.kill(raylet.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    finish(run)
    assert held(tmp_path, "shard") == undisturbed


# --- disks ---------------------------------------------------------------------------------------------------------


def test_whichever_file_of_a_shard_finds_the_disk_full_the_next_attempt_writes_the_same_bytes(
    pictures, disk, tmp_path
):
    config = ShardConfig(image_size=32, encode_format="png", samples_per_shard=4)
    rows = sources.list_rows(SourceConfig(path=str(pictures), limit=4))

    def attempt(folder: Path) -> None:
        record = write_shard(rows, 0, str(folder), config)
        manifest.publish_receipt(str(folder), record)
        snapshot = Snapshot(stage="shard", version=1, fingerprint="f", config={}, shards=(record,))
        known = growth.grown(growth.nothing_known(), *_all_new(rows))
        growth.save(str(folder), "f", known)
        manifest.publish_snapshot(str(folder), snapshot)

    attempt(tmp_path / "roomy")
    whole = _contents(tmp_path / "roomy")
    finished: set[int] = set()
    for pages in itertools.count(1):
        folder = disk(f"size={pages * PAGE}") / f"{pages}"
        try:
            attempt(folder)
            break
        except OSError as error:
            assert "No space left" in str(error)
        left = _contents(folder)
        assert left.items() <= whole.items() and not list(folder.rglob(".tmp-*")), "whole files and no draft"
        finished.add(len(left))
        disk(f"size={1000 * PAGE}")
        attempt(folder)
        assert _contents(folder) == whole
        shutil.rmtree(folder)
    assert finished == set(range(len(whole))), "each file in turn was the one without room"


def _all_new(rows: list[Any]) -> tuple[growth.Growth, np.ndarray, list[tuple[int, str]]]:
    identities = sources.row_identities(rows)
    change = growth.growth(growth.nothing_known(), identities)
    assert change is not None
    return change, identities, [(growth.WRITTEN, "")] * len(rows)


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- sources -------------------------------------------------------------------------------------------------------


def test_a_picture_that_vanishes_during_the_run_is_a_failed_row_and_a_new_one_when_it_is_back(
    pictures, undisturbed, tmp_path
):
    """The same file with the same time: what the run found was an empty place, and that is not what the source has now."""
    source, root = tmp_path / "pictures", tmp_path / "root"
    shutil.copytree(pictures, source)
    listed = planned(source, root).stages[0]
    run = start(source, root, workers=1)
    wait_for(lambda: receipts(root), run)
    shutil.move(source / "59.png", tmp_path / "aside.png")
    finish(run)

    snapshot = manifest.load_snapshot(listed.folder, listed.fingerprint)
    assert snapshot is not None, "the listing is the one that the run began with"
    ledger = snapshot.ledger
    assert (ledger.attempted, ledger.written, ledger.failed) == (PICTURES, PICTURES - 1, {"missing_image": 1})
    lines = pq.read_table(f"{listed.folder}/{SHARDS - 1:05d}.parquet").to_pylist()
    (row,) = [line for line in lines if line["status"] != "success"]
    assert (row["source_id"], row["status"]) == ("59.png", "failed_to_download")
    assert "no file at the place" in row["error_message"]
    complete = tuple(f"{Path(listed.folder).name}/{index:05d}" for index in range(SHARDS - 1))
    shards = {name: digest for name, digest in undisturbed.items() if name.startswith(complete)}
    assert len(shards) == 3 * (SHARDS - 1) and shards.items() <= held(root, "shard").items(), (
        "the others are untouched"
    )

    shutil.move(tmp_path / "aside.png", source / "59.png")
    mended = planned(source, root).stages[0]
    assert (mended.status, mended.folder) == ("pending", listed.folder)
    assert mended.reason == "1 new row in 1 new shard"


# --- object stores -------------------------------------------------------------------------------------------------


def test_an_object_store_that_fails_every_fifth_request_gets_the_bytes_of_a_disk(
    pictures, undisturbed, tmp_path, bucket, object_store
):
    with stuttering(object_store.address) as (address, faults):
        variables = {"AWS_ENDPOINT_URL": address, "HOME": str(tmp_path)}
        finish(start(pictures, f"{bucket}/root", workers=2, **variables))
    assert held(f"{bucket}/root", "shard") == undisturbed
    assert {*FAULTS} <= {*faults}, "it met every kind of fault"
