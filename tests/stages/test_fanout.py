"""Shards over real Ray actors: every shard once, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import StageFailed, UserError
from data.manifest import FileRecord, ShardRecord, keys_digest
from stages.cluster import cluster
from stages.contract import FanoutConfig, Workspace
from stages.fanout import ShardTask, Writing, finished, map_shards

pytestmark = pytest.mark.slow


class Working:
    """Writes one file per shard, leaves a mark per call, and misbehaves on request."""

    def __init__(self, marks: str, seconds: float = 0.0) -> None:
        self.marks, self.seconds, self.hoard = Path(marks), seconds, []

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord:
        calls = len(list(self.marks.glob(f"{task.index}-*")))
        (self.marks / f"{task.index}-{os.getpid()}-{time.time_ns()}").touch()
        if task.payload == "die always" or (task.payload == "die once" and not calls):
            os.kill(os.getpid(), signal.SIGKILL)
        while task.payload == "hog":
            self.hoard.append(np.ones(1 << 24, np.uint8))
        if task.payload == "user error":
            raise UserError("this config cannot work: use another")
        if task.payload == "fail":
            raise RuntimeError("a defect")
        time.sleep(self.seconds)
        Path(folder, f"{task.index}.txt").write_text(str(task.payload))
        files = (FileRecord(path=f"{task.index}.txt", bytes=1, sha256="0" * 64),)
        return ShardRecord(
            index=task.index, samples=1, keys=keys_digest([]), files=files, parents=dict(task.parents)
        )


class WritingApart(Working):
    """Leaves what it computed to be written in half a second, in which it may die or fail."""

    def __call__(self, task: ShardTask, folder: str) -> Writing:
        began = time.time()

        def write() -> ShardRecord:
            time.sleep(self.seconds)
            record = super(WritingApart, self).__call__(task, folder)
            (self.marks / f"{task.index}-{began}-{time.time()}").touch()
            return record

        return write


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster("local"):
        yield


@pytest.fixture
def place(tmp_path: Path) -> tuple[Workspace, dict[str, str]]:
    (tmp_path / "out").mkdir()
    (tmp_path / "marks").mkdir()
    fanout = FanoutConfig(num_workers=2, max_attempts=2)
    return Workspace(str(tmp_path / "out"), "f" * 12, fanout), {"marks": str(tmp_path / "marks")}


def calls(arguments: dict[str, str]) -> list[int]:
    return sorted(int(mark.name.split("-")[0]) for mark in Path(arguments["marks"]).iterdir())


@pytest.mark.usefixtures("ray_cluster")
def test_every_shard_is_made_once_in_index_order_and_a_second_call_makes_none(place):
    workspace, arguments = place
    tasks = [ShardTask(index, f"shard {index}") for index in range(7)]
    records = map_shards(Working, arguments, tasks, workspace)
    assert [record.index for record in records] == list(range(7))
    assert map_shards(Working, arguments, tasks, workspace) == records
    assert calls(arguments) == list(range(7))


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_whose_worker_is_killed_is_tried_again_by_a_new_one(place):
    workspace, arguments = place
    tasks = [ShardTask(0, "fine"), ShardTask(1, "die once"), ShardTask(2, "fine")]
    assert len(map_shards(Working, arguments, tasks, workspace)) == 3
    assert calls(arguments) == [0, 1, 1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_a_poison_shard_is_quarantined_by_name_after_its_attempts_and_the_others_are_finished(place):
    workspace, arguments = place
    tasks = [ShardTask(0, "die always"), *(ShardTask(index, "fine") for index in range(1, 5))]
    with pytest.raises(
        StageFailed, match=r"1 of 5 shards failed; shard 00000: its worker died .* 2 attempts"
    ):
        map_shards(Working, arguments, tasks, workspace)
    assert sorted(finished(tasks, workspace.folder)) == [1, 2, 3, 4]
    assert calls(arguments).count(0) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_an_exception_names_its_shard_and_a_users_mistake_is_raised_as_it_is(place):
    workspace, arguments = place
    with pytest.raises(StageFailed, match="shard 00000: RuntimeError: a defect, 2 attempts"):
        map_shards(Working, arguments, [ShardTask(0, "fail")], workspace)
    with pytest.raises(UserError, match="use another"):
        map_shards(Working, arguments, [ShardTask(1, "user error")], workspace)
    assert calls(arguments) == [0, 0, 1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_receipt_made_from_other_parents_is_stale_and_its_shard_is_made_anew(place):
    workspace, arguments = place
    map_shards(
        Working,
        arguments,
        [ShardTask(0, "old", {"data": "a"}), ShardTask(1, "kept", {"data": "a"})],
        workspace,
    )
    map_shards(
        Working,
        arguments,
        [ShardTask(0, "new", {"data": "b"}), ShardTask(1, "kept", {"data": "a"})],
        workspace,
    )
    assert Path(workspace.folder, "0.txt").read_text() == "new"
    assert calls(arguments) == [0, 0, 1]


@pytest.mark.usefixtures("ray_cluster")
def test_the_next_shard_is_computed_while_one_is_written(place):
    workspace, arguments = place
    workspace = replace(workspace, fanout=FanoutConfig(num_workers=1))
    tasks = [ShardTask(i, "plain") for i in range(3)]
    records = map_shards(WritingApart, arguments | {"seconds": 0.5}, tasks, workspace)
    assert [record.index for record in records] == [0, 1, 2]
    assert finished(tasks, workspace.folder).keys() == {0, 1, 2}
    spans = [mark.name.split("-") for mark in Path(arguments["marks"]).iterdir() if "." in mark.name]
    ordered = sorted((int(index), float(began), float(ended)) for index, began, ended in spans)
    assert ordered[1][1] < ordered[0][2] and ordered[2][1] < ordered[1][2], (
        "it began before the one before was written"
    )


@pytest.mark.usefixtures("ray_cluster")
def test_a_writing_that_dies_or_fails_is_a_failed_attempt_of_its_own_shard(place):
    workspace, arguments = place
    tasks = [
        ShardTask(i, payload) for i, payload in enumerate(["plain", "die once", "plain", "fail", "plain"])
    ]
    with pytest.raises(
        StageFailed, match="1 of 5 shards failed; shard 00003: RuntimeError: a defect, 2 attempts"
    ):
        map_shards(WritingApart, arguments, tasks, workspace)
    assert finished(tasks, workspace.folder).keys() == {0, 1, 2, 4}


@pytest.mark.usefixtures("ray_cluster")
def test_no_shard_for_too_long_is_a_failure_and_not_a_hang(place):
    workspace, arguments = place
    impatient = Workspace(
        workspace.folder, workspace.fingerprint, FanoutConfig(num_workers=1, stall_seconds=1)
    )
    with pytest.raises(StageFailed, match="no shard finished for 1 s"):
        map_shards(Working, {**arguments, "seconds": 60.0}, [ShardTask(0, "slow")], impatient)


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has_room_for_hold_no_shard_back(place):
    workspace, arguments = place
    many = FanoutConfig(num_workers=2 * (os.cpu_count() or 1), stall_seconds=60)
    tasks = [ShardTask(index, "fine") for index in range(3 * (os.cpu_count() or 1))]
    records = map_shards(Working, arguments, tasks, Workspace(workspace.folder, workspace.fingerprint, many))
    assert len(records) == len(tasks)


def workers(arguments: dict[str, str]) -> set[int]:
    return {int(mark.name.split("-")[1]) for mark in Path(arguments["marks"]).iterdir()}


@pytest.mark.usefixtures("ray_cluster")
def test_on_a_cluster_of_ones_own_the_next_stage_has_the_same_workers_and_one_that_died_at_rest_is_replaced(
    place,
):
    workspace, arguments = place
    workspace = replace(workspace, fanout=FanoutConfig(num_workers=1))
    map_shards(Working, arguments, [ShardTask(0, "fine")], workspace)
    (first,) = workers(arguments)
    map_shards(Working, arguments, [ShardTask(1, "fine")], workspace)
    assert workers(arguments) == {first}
    os.kill(first, signal.SIGKILL)
    map_shards(Working, arguments, [ShardTask(2, "fine")], workspace)
    assert len(workers(arguments)) == 2 and calls(arguments) == [0, 1, 2]


DRIVER = """
import sys
from stages.cluster import cluster
from stages.contract import FanoutConfig, Workspace
from stages.fanout import ShardTask, map_shards
from test_fanout import Working

folder, marks = sys.argv[1:]
with cluster("local"):
    tasks = [ShardTask(index, f"shard {index}") for index in range(12)]
    map_shards(Working, {"marks": marks, "seconds": 0.3}, tasks, Workspace(folder, "f" * 12, FanoutConfig(num_workers=2)))
"""


def test_after_a_sigkill_of_the_whole_process_group_a_rerun_makes_only_what_has_no_receipt(tmp_path):
    out, marks = tmp_path / "out", tmp_path / "marks"
    out.mkdir()
    marks.mkdir()
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent.parent}{os.pathsep}{here}"}
    command = [sys.executable, "-c", DRIVER, str(out), str(marks)]
    receipts = out / "_meta" / "receipts"
    with subprocess.Popen(command, env=environment, start_new_session=True) as first:
        deadline = time.monotonic() + 120
        while len(list(receipts.glob("[0-9]*.json"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in receipts.glob("0*.json")}
    assert 3 <= len(kept) < 12
    subprocess.run(command, env=environment, check=True, timeout=180)
    assert len(list(receipts.glob("0*.json"))) == 12
    assert all((receipts / name).stat().st_mtime_ns == written for name, written in kept.items())
    assert not list(out.rglob(".tmp-*"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that Ctrl-C reaches: one in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ray_cluster", "interruptible")
def test_told_to_stop_it_finishes_the_shards_that_it_has_begun_and_begins_no_other(place):
    workspace, arguments = place
    tasks = [ShardTask(index, "fine") for index in range(40)]

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not calls(arguments) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        map_shards(Working, arguments | {"seconds": 2.0}, tasks, workspace)
    thread.join()
    assert sorted(finished(tasks, workspace.folder)) == calls(arguments) and len(calls(arguments)) in (1, 2)


HUNGRY = """
import sys
from data.errors import StageFailed
from stages.cluster import cluster
from stages.contract import FanoutConfig, Workspace
from stages.fanout import ShardTask, map_shards
from test_fanout import Working

folder, marks = sys.argv[1:]
tasks = [ShardTask(0, "hog"), ShardTask(1, "fine"), ShardTask(2, "fine")]
with cluster("local"):
    try:
        map_shards(Working, {"marks": marks}, tasks, Workspace(folder, "f" * 12, FanoutConfig(num_workers=1, max_attempts=2, stall_seconds=120)))
    except StageFailed as error:
        sys.stdout.write(str(error))
"""


def test_a_shard_that_eats_all_memory_is_quarantined_like_one_that_kills_its_worker(tmp_path):
    """Ray kills whoever makes the machine run out of memory; here three gigabytes above what is used now count as that."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    out, marks, here = tmp_path / "out", tmp_path / "marks", Path(__file__).parent
    out.mkdir()
    marks.mkdir()
    threshold = (get_used_memory() + (3 << 30)) / get_system_memory()
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent.parent}{os.pathsep}{here}",
        "RAY_memory_usage_threshold": str(threshold),
        "RAY_memory_monitor_refresh_ms": "50",
    }
    driver = [sys.executable, "-c", HUNGRY, str(out), str(marks)]
    ended = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=300)
    assert (
        ended.stdout == "1 of 3 shards failed; shard 00000: its worker died (OutOfMemoryError), 2 attempts"
    ), ended.stderr
    assert len(list(out.glob("_meta/receipts/0*.json"))) == 2
