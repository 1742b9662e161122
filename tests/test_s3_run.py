"""A whole run with its root in an object store, killed on its way: the same command resumes it from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import storage
from data.manifest import Snapshot, snapshots

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, TINY, command, environment, result

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
