"""Training under faults: whatever dies, the weights are those of a training that nothing disturbed, to the bit.

Each fault meets DDP and FSDP2 (gloo on the CPU), two workers each. `darkroom` is not needed: a stage is run by its spec.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import kill

from data import sources
from data.manifest import Snapshot, publish_snapshot
from data.shards import ShardConfig, write_shard
from data.sources import SourceConfig
from stages import restarts
from stages.contract import InputRef, StageSpec
from training import checkpoint_facts
from training.systems.vae import VaeConfig

CHECKOUT = Path(__file__).parents[2]
pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 400
MODES = pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """One shard of 24 noisy pictures."""
    folder, out = tmp_path_factory.mktemp("pictures"), str(tmp_path_factory.mktemp("shards"))
    noise = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"noise {i}")
    rows = sources.list_rows(SourceConfig(path=str(folder)))
    record = write_shard(rows, 0, out, ShardConfig(image_size=16, encode_format="png"))
    columns = ("caption", "image")
    snapshot = Snapshot(
        stage="shard", version=1, fingerprint="d" * 12, config={}, columns=columns, shards=(record,)
    )
    return publish_snapshot(out, snapshot)


def start(
    data: Snapshot, folder: Path, *options: str, fsdp: bool, checkpoint_every: int = 50, steps: int = STEPS
) -> subprocess.Popen[str]:
    """The training as `python -m stages` runs it, in a process group of its own."""
    config = VaeConfig(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        max_steps=steps,
        batch_size=6,
        num_workers=2,
        fsdp=fsdp,
        checkpoint_every=checkpoint_every,
        seed=3,
    )
    spec = StageSpec(
        stage="vae",
        config=config.model_dump(mode="json"),
        inputs={"data": InputRef(stage="shard", folder=data.folder, fingerprint=data.fingerprint)},
        folder=str(folder),
        fingerprint="f" * 12,
    )
    path = folder.with_suffix(".json")
    path.write_text(spec.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "stages", str(path), *options],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"},
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen[str], folder: Path) -> dict[str, str]:
    """Waits for a run that has to end well; name -> SHA-256 of what it published."""
    try:
        said, _ = run.communicate(timeout=400)
    finally:
        kill(run)
    assert run.returncode == 0, said[-3000:]
    snapshot = json.loads((folder / "_meta" / "snapshots" / f"{'f' * 12}.json").read_text())
    published = {file["path"]: file["sha256"] for file in snapshot["files"]}
    for name, digest in published.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {"curve.parquet", "diffusion_pytorch_model.safetensors", "config.json"} == published.keys()
    return published


def wait_for(sign: Callable[[], Any], run: subprocess.Popen[str]) -> Any:
    """What `sign` returns once that is true; the run must not end before."""
    deadline = time.monotonic() + 300
    while not (seen := sign()):
        assert run.poll() is None, run.communicate()
        if time.monotonic() > deadline:
            kill(run)
            pytest.fail("the run made no progress")
        time.sleep(0.005)
    return seen


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/step_*"))


def workers_below(ancestor: int) -> list[int]:
    """The training workers among the children of the process `ancestor` and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    below, level = [], [ancestor]
    while level := [pid for pid, parent in parents.items() if parent in level]:
        below += level
    return [pid for pid in below if b"RayTrainWorker" in _title(pid)]


def _title(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture(scope="module")
def undisturbed(data: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], dict[str, str]]:
    """fsdp -> what a training publishes when nothing happens."""
    made: dict[bool, dict[str, str]] = {}

    def published(fsdp: bool) -> dict[str, str]:
        if fsdp not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "vae"
            made[fsdp] = finish(start(data, folder, fsdp=fsdp), folder)
        return made[fsdp]

    return published


@pytest.fixture
def expected(undisturbed: Callable[[bool], dict[str, str]], fsdp: bool) -> dict[str, str]:
    """What the training has to publish, made before a cluster starts beside which it would run."""
    return undisturbed(fsdp)


@MODES
def test_a_killed_worker_and_then_a_killed_driver_change_no_bit(data, expected, tmp_path, fsdp):
    folder = tmp_path / "vae"
    run = start(data, folder, fsdp=fsdp)
    wait_for(lambda: checkpoints(folder), run)
    os.kill(workers_below(run.pid)[0], signal.SIGKILL)
    later = "step_00000200"
    wait_for(lambda: (steps := checkpoints(folder)) and steps[-1].name >= later, run)
    kill(run)
    assert not (folder / "_meta" / "snapshots").exists(), "it was killed in the middle of its work"
    record = folder / "_meta" / "ray" / "vae-1" / "checkpoint_manager_snapshot.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"ray_version": "2.6')
    assert finish(start(data, folder, fsdp=fsdp), folder) == expected
    assert not record.exists(), "Ray's own record, cut short, does no harm and does not stay"
    rows = pq.read_table(folder / "_meta" / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == list(range(20, STEPS + 1, 20))
    assert not checkpoints(folder), "a cosine schedule leaves nothing to go on from"


@pytest.mark.parametrize("fsdp", [False], ids=["ddp"])
def test_workers_may_die_any_number_of_times_while_checkpoints_advance(data, expected, tmp_path, fsdp):
    folder = tmp_path / "vae"
    run, seen = start(data, folder, fsdp=fsdp), ""
    for _ in range(restarts.IN_A_ROW + 2):
        wait_for(lambda at=seen: checkpoint_facts.latest(str(folder / "checkpoints")) > at, run)
        seen = checkpoint_facts.latest(str(folder / "checkpoints"))
        os.kill(wait_for(lambda: workers_below(run.pid), run)[0], signal.SIGKILL)
    assert finish(run, folder) == expected


def test_workers_that_die_before_every_checkpoint_end_the_training_with_a_sentence(data, tmp_path):
    folder = tmp_path / "vae"
    run = start(data, folder, fsdp=False, checkpoint_every=10**6, steps=10**6)
    for attempt in range(restarts.IN_A_ROW + 1):
        wait_for(lambda n=attempt: len(list(folder.glob("_meta/tensorboard/events.*"))) > n, run)
        os.kill(workers_below(run.pid)[0], signal.SIGKILL)
    try:
        said, _ = run.communicate(timeout=200)
    finally:
        kill(run)
    assert run.returncode == 1 and not checkpoints(folder)
    assert "training failed: " in said and "(3 restarts in a row brought no newer checkpoint)" in said


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of three nodes, a CPU on each of two, which misses a dead one within ten seconds."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from ray.cluster_utils import Cluster

    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 20,
    }
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()


@MODES
def test_a_lost_node_that_is_replaced_changes_no_bit(data, expected, tmp_path, nodes, fsdp):
    folder = tmp_path / "vae"
    run = start(data, folder, f"--address={nodes.address}", fsdp=fsdp)
    wait_for(lambda: checkpoints(folder), run)
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    nodes.add_node(num_cpus=1)
    assert finish(run, folder) == expected


@MODES
def test_a_notice_of_preemption_is_answered_with_a_checkpoint(data, expected, tmp_path, nodes, fsdp):
    folder = tmp_path / "vae"
    run = start(data, folder, f"--address={nodes.address}", fsdp=fsdp)
    wait_for(lambda: checkpoints(folder), run)
    leaving = next(iter(nodes.worker_nodes))
    drain(nodes.gcs_address, leaving.node_id, seconds=60)
    wait_for(lambda: [s for s in checkpoints(folder) if int(s.name[5:]) % 50], run)
    nodes.remove_node(leaving, allow_graceful=False)
    nodes.add_node(num_cpus=1)
    assert finish(run, folder) == expected


def drain(gcs_address: str, node_id: str, *, seconds: float) -> None:
    """What a cloud's notice of preemption makes an autoscaler tell Ray."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=gcs_address).drain_node(
        node_id, reason, "the spot instance is reclaimed", deadline_ms
    )
    assert accepted, why
