"""Deployed runs that are cancelled, killed, or lose their worker or their server: the next run resumes what the last one left."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.states import Cancelling

from data.manifest import snapshots
from flows import serving

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from prefect_server import (
    deploy,
    ended,
    entry,
    eventually,
    free_port,
    log,
    process_of,
    start,
    talking_to,
)
from ray_cluster import RayCluster, ray_cluster

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1800)]
PICTURES, PER_SHARD = 400, 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 400 pictures that take some seconds to shard: one photograph-sized file under many names."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "0000.jpg")
    for i in range(PICTURES):
        if i:
            os.link(folder / "0000.jpg", folder / f"{i:04d}.jpg")
        (folder / f"{i:04d}.txt").write_text(f"picture {i}")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def server(home) -> Iterator[str]:
    with serving.server(home, free_port()) as (url, _), talking_to(url):
        yield url


@pytest.fixture
def deployment(server, pictures, tmp_path) -> str:  # noqa: ARG001
    """A deployment of `prepare` on the pictures, under the root `tmp_path / "runs"`, one shard at a time."""
    return deployed(pictures, tmp_path)


@pytest.fixture
def jobs(monkeypatch) -> Iterator[RayCluster]:
    """A cluster with a job server, whose token a worker that is started has."""
    with ray_cluster() as made:
        made.start_head(num_cpus=1)
        for name, value in made.client.items():
            monkeypatch.setenv(name, value)
        yield made


def deployed(pictures: Path, folder: Path, **place: str) -> str:
    """What the name says, on the server that is talked to; returns the deployment's name."""
    settings = {"shard.samples_per_shard": PER_SHARD, "shard.image_size": 32, "fanout.num_workers": 1}
    run = {"data": str(pictures), "root": str(folder / "runs"), "settings": settings} | place
    name = folder.name.replace("_", "-")
    deploy(folder, entry("prepare", name, run))
    return f"prepare/{name}"


def receipts(root: Path) -> dict[str, int]:
    """Name -> time of change of the receipts of finished shards."""
    return {p.name: p.stat().st_mtime_ns for p in root.glob("store/shard/*/_meta/receipts/[0-9]*.json")}


def begun(root: Path) -> dict[str, int]:
    """The receipts of the first shards that a run finished, while it goes on."""
    done = eventually(lambda: len(found := receipts(root)) > 2 and found)
    assert len(done) < PICTURES // PER_SHARD, "killed too late to tell anything"
    return done


def resumed(deployment: str, root: Path, done: dict[str, int]) -> None:
    """The next run ends, and makes nothing again that was `done`."""
    state = ended(start(deployment))
    assert state.name == "Completed", state.message
    after = receipts(root)
    assert {name: after[name] for name in done} == done
    (made,) = snapshots(str(next((root / "store" / "shard").iterdir())))
    assert made.ledger.written == made.ledger.attempted == PICTURES


def killed_and_resumed(home: Path, server: str, deployment: str, root: Path) -> None:
    """A run whose process is killed in the middle is crashed, and the next one goes on."""
    with serving.worker(home, server, "darkroom") as worker:
        run = start(deployment)
        done = begun(root)
        os.kill(process_of(worker.pid), signal.SIGKILL)
        assert ended(run).name == "Crashed"
        resumed(deployment, root, done)


def test_a_run_cancelled_from_the_api_ends_and_the_next_one_resumes(server, home, deployment, tmp_path):
    root = tmp_path / "runs"
    with serving.worker(home, server, "darkroom") as worker:
        run = start(deployment)
        done = begun(root)
        process = process_of(worker.pid)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        assert ended(run).name == "Cancelled"
        eventually(lambda: not Path(f"/proc/{process}").exists(), 30)
        assert not list((root / "store").glob("shard/*/_meta/snapshots/*")), "what was cancelled is not done"
        eventually(lambda: any("next run of this deployment resumes" in line for line in log(run)))
        resumed(deployment, root, done)


def test_stages_of_a_flow_are_jobs_of_a_cluster_and_a_cancelled_one_stops_after_the_shards_begun(
    server, home, pictures, jobs, tmp_path
):
    root = tmp_path / "runs"
    deployment = deployed(pictures, tmp_path, address=jobs.http)
    with serving.worker(home, server, "darkroom"):
        run = start(deployment)
        done = begun(root)
        (job,) = jobs.jobs()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Cancelling())
        assert ended(run).name == "Cancelled"
        eventually(lambda: jobs.jobs()[job]["status"] == "STOPPED", 90, lambda: str(jobs.jobs()[job]))
        assert not list(root.rglob(".tmp-*")) and not list(root.rglob("_meta/lease.json"))
        eventually(lambda: f"shard is job {job}" in log(run), 30, lambda: str(log(run)))
        resumed(deployment, root, done)
    first, second = sorted(jobs.jobs().values(), key=lambda each: each["start_time"])
    assert (first["status"], second["status"]) == ("STOPPED", "SUCCEEDED")
    assert jobs.token not in "".join(log(run))


def test_a_flow_that_is_killed_leaves_its_job_which_the_next_run_goes_on_with(
    server, home, pictures, jobs, tmp_path
):
    killed_and_resumed(home, server, deployed(pictures, tmp_path, address=jobs.http), tmp_path / "runs")
    (job,) = jobs.jobs().values()
    assert job["status"] == "SUCCEEDED"


def test_a_run_whose_process_is_killed_is_crashed_and_the_next_one_resumes(
    server, home, deployment, tmp_path
):
    killed_and_resumed(home, server, deployment, tmp_path / "runs")


def test_a_run_that_lost_its_worker_alone_goes_on_to_its_end_and_is_not_begun_again(
    server, home, deployment, tmp_path
):
    root = tmp_path / "runs"
    with serving.worker(home, server, "darkroom") as worker:
        run = start(deployment)
        done, process = begun(root), process_of(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        with serving.worker(home, server, "darkroom"):
            state = ended(run)
            assert state.name == "Completed", state.message
            with get_client(sync_client=True) as client:
                assert client.read_flow_run(run.id).run_count == 1
            eventually(lambda: not Path(f"/proc/{process}").exists(), 60)
            resumed(deployment, root, done)


def test_a_run_that_lost_its_process_and_its_worker_is_crashed_by_the_automation(
    server, home, deployment, tmp_path
):
    root = tmp_path / "runs"
    with serving.worker(home, server, "darkroom") as worker:
        run = start(deployment)
        done = begun(root)
        process = process_of(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        worker.wait()
    with serving.worker(home, server, "darkroom"):
        state = ended(run)
        assert state.name == "Crashed" and state.message.startswith("no heartbeat for 120 s")
        resumed(deployment, root, done)


def test_a_restart_of_the_server_leaves_the_result_of_a_stage_as_it_is(pictures, tmp_path):
    root, home, port = tmp_path / "runs", tmp_path / "home", free_port()

    def commits() -> list[Path]:
        return list((root / "store").glob("shard/*/_meta/snapshots/*"))

    with serving.server(home, port) as (url, process), talking_to(url):
        deployment = deployed(pictures, tmp_path)
        with serving.worker(home, url, "darkroom") as worker:
            run = start(deployment)
            done = begun(root)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert not commits(), "killed too late to tell anything"
            with serving.server(home, port):
                eventually(commits)
                ended(run)  # whatever Prefect calls it
                assert worker.poll() is None
                resumed(deployment, root, done)
