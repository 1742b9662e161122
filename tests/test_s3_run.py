"""Runs with their root in an object store, killed on their way: the same command resumes them from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from data import storage
from data.manifest import Snapshot, snapshots
from data.verify import verify

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, TINY, command, environment, result
from pictures import add_pictures
from processes import finish, kill, launch, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1500)]
DEADLINE = 600.0
SETTINGS = TINY | {"clip.max_steps": 60}
"""A CLIP that trains long enough to be caught at it."""


def made(root: str, stage: str) -> Snapshot:
    """The one artifact of a stage."""
    (key,) = storage.list_folders(f"{root}/store/{stage}")
    (snapshot,) = snapshots(f"{root}/store/{stage}/{key}")
    return snapshot


def killed_in(stage: str, root: str, variables: dict[str, str]) -> None:
    """Runs until the training of `stage` has a checkpoint in the store, and kills the whole process group."""
    line = command("run", "demo", "--json", root=root, settings=SETTINGS)  # type: ignore[arg-type]
    run = subprocess.Popen(
        line, env=variables, cwd=CHECKOUT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + DEADLINE
    try:
        while not any(
            storage.exists(f"{root}/store/{stage}/{key}/checkpoints/LATEST")
            for key in storage.list_folders(f"{root}/store/{stage}")
        ):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def test_a_killed_run_resumes_from_the_store_and_ends_with_the_bytes_of_one_on_a_disk(bucket, tmp_path):
    root, variables = f"{bucket}/runs", environment() | {"DARKROOM_CACHE": str(tmp_path / "cache")}
    killed_in("clip", root, variables)
    line = command("run", "demo", "--json", root=root, settings=SETTINGS)  # type: ignore[arg-type]
    again = subprocess.run(line, env=variables, cwd=CHECKOUT, capture_output=True, text=True, timeout=900)
    record = result(again)
    ran = {stage["name"]: stage["status"] for stage in record["stages"]}
    assert ran["shard"] == "cached" and ran["report"] == "ran"
    assert record["report"] == f"{root}/{record['run']}/report.html"
    assert b"</html>" in storage.read_bytes(record["report"])

    line = command("run", "demo", "--json", "--until=embed", root=tmp_path / "disk", settings=SETTINGS)
    result(subprocess.run(line, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=900))
    for stage in ("shard", "clip", "embed"):
        there, here = made(root, stage), made(str(tmp_path / "disk"), stage)
        assert [f.sha256 for f in there.files] == [f.sha256 for f in here.files], stage
        assert [s.digest for s in there.shards] == [s.digest for s in here.shards], stage

    line = [sys.executable, "-m", "flows.cli", "verify", root, "--json"]
    verdict = result(
        subprocess.run(line, env=variables, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    )
    assert verdict["ok"], verdict["problems"]
    left = [entry.name for entry in storage.list_tree(f"{root}/store") if "checkpoints/" in entry.name]
    assert left == [] and not storage.exists(f"{root}/{record['run']}/started.json")


PICTURES, PER_SHARD = 12, 3
HELD_BACK = "00002.tar"


class Stuck:
    """A store that takes no tar of the third shard while somebody kills the run; it counts what it was given."""

    def __init__(self) -> None:
        self.killed = threading.Event()
        self.put: Counter[str] = Counter()

    def __call__(self, method: str, path: str) -> bool:
        name = path.rpartition("/")[2]
        self.put[name] += method == "PUT"
        if (method, name) == ("PUT", HELD_BACK) and not self.killed.is_set():
            self.killed.wait(120)
            return True
        return False


def test_shards_that_a_killed_preparation_left_in_the_store_are_taken_on(bucket, object_store, tmp_path):
    source = str(add_pictures(tmp_path / "pictures", range(PICTURES), side=64))
    settings = {"shard.samples_per_shard": PER_SHARD, "shard.image_size": 32, "fanout.num_workers": 1}
    line = command("prepare", source, "--json", root=f"{bucket}/runs", settings=settings)  # type: ignore[arg-type]
    object_store.refuses = stuck = Stuck()
    run = launch(line)
    try:
        wait_for(lambda: stuck.put[HELD_BACK], run)
    finally:
        kill(run)
        stuck.killed.set()
    (key,) = storage.list_folders(f"{bucket}/runs/store/shard")
    folder = f"{bucket}/runs/store/shard/{key}"
    assert snapshots(folder) == [], "nothing half done was taken for whole"
    assert sorted(storage.list_files(f"{folder}/_meta/receipts")) == ["00000.json", "00001.json"]

    stuck.put.clear()
    finish(launch(line))
    finished = [f"{shard:05d}{kind}" for shard in range(2) for kind in (".tar", ".parquet", ".json")]
    assert {name: stuck.put[name] for name in (*finished, HELD_BACK)} == {
        **dict.fromkeys(finished, 0),
        HELD_BACK: 1,
    }
    finish(launch(command("prepare", source, "--json", root=tmp_path / "disk", settings=settings)))
    there, here = made(f"{bucket}/runs", "shard"), made(str(tmp_path / "disk"), "shard")
    assert there.shards == here.shards and there.samples == PICTURES
    assert verify(f"{bucket}/runs").ok
