"""Stages as jobs of a real cluster: `ray start`, its job server, a token, and clients that come, are killed and come again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, command, environment, result
from ray_cluster import RayCluster, below, free_port, ray_cluster, title

from data.manifest import load_snapshot
from flows.assignments import edited
from flows.graph import unclip_nodes
from flows.plan import make_plan
from flows.recipes import demo
from flows.runs import spec_of
from stages.contract import InputRef, JobsConfig, StageSpec
from training.systems.vae import VaeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = {"source.count": 60, "shard.samples_per_shard": 10}
SHARDS = 30
LONG = {"source.count": 50 * SHARDS, "shard.samples_per_shard": 50, "shard.image_size": 256}
"""Shards that take a good part of a second each, so that there is a middle of the work."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head with one CPU."""
    with ray_cluster() as made:
        made.start_head(num_cpus=1)
        yield made


def shards(root: Path, settings: dict[str, Any], **changes: Any) -> StageSpec:
    """The spec of a recipe's first stage, as a flow would launch it."""
    recipe = edited(demo(), [f"{path}={value}" for path, value in settings.items()])
    plan = make_plan(recipe, unclip_nodes(recipe), str(root))
    return spec_of(plan, plan.stages[0]).model_copy(update=changes)


def start(
    spec: StageSpec, root: Path, address: str, token: str | None, *options: str
) -> subprocess.Popen[str]:
    """A client that runs a spec as a job: what a flow does without Prefect, which takes half a minute here."""
    root.mkdir(exist_ok=True)
    path = root / f"{spec.stage}.json"
    path.write_text(spec.model_dump_json())
    held = {"RAY_AUTH_TOKEN": token} if token else {}
    return subprocess.Popen(
        [sys.executable, "-m", "stages", str(path), f"--address={address}", "--journal", *options],
        env=environment() | held,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def end(client: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    """(exit code, stderr) of a client that has to end."""
    try:
        _, said = client.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        client.kill()
        pytest.fail(f"the client hangs: {client.communicate()}")
    assert "Traceback" not in said, said
    return client.returncode, said


def wait_for(
    sign: Callable[[], Any], client: subprocess.Popen[str] | None = None, seconds: float = 200
) -> Any:
    """What `sign` returns once that is true; the client must not end before."""
    deadline = time.monotonic() + seconds
    while not (seen := sign()):
        if client and client.poll() is not None:
            pytest.fail(f"the client ended too early: {client.communicate()}")
        if time.monotonic() > deadline:
            with suppress(AttributeError):
                client.kill()
            pytest.fail("nothing happened")
        time.sleep(0.05)
    return seen


def receipts(spec: StageSpec) -> dict[str, int]:
    """Finished shard -> when its receipt was written; one that is being written (`.tmp-…`) is not there yet."""
    folder = Path(spec.folder, "_meta", "receipts")
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.json")}


# --- a whole command ------------------------------------------------------------------------------------------------


def test_a_stage_is_a_job_and_its_shards_are_those_of_a_run_on_this_machine(
    cluster, darkroom, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    line = ["run", "demo", "--until=shard", "--json"]
    made = darkroom(*line, f"--address={cluster.http}", root=tmp_path / "job", settings=SMALL)
    assert [stage["status"] for stage in result(made)["stages"]] == ["ran"]
    assert "0/60 samples" in made.stderr and "is job shard-" in made.stderr
    here = darkroom(*line, root=tmp_path / "here", settings=SMALL)
    digests = [
        {path.name: path.read_bytes() for path in root.glob("store/shard/*/0*")}
        for root in (tmp_path / "job", tmp_path / "here")
    ]
    assert result(here) and digests[0] == digests[1] and len(digests[0]) == 18
    again = darkroom(*line, f"--address={cluster.http}", root=tmp_path / "job", settings=SMALL)
    assert [stage["status"] for stage in result(again)["stages"]] == ["cached"]
    secret = cluster.token.encode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert cluster.token not in json.dumps(cluster.jobs()) + made.stderr
    assert not [log for log in cluster.folder.rglob("job-driver-*.log") if secret in log.read_bytes()]


@pytest.mark.faults
def test_a_command_that_is_told_to_end_stops_its_job_after_the_shards_begun(cluster, tmp_path):
    line = command("run", "demo", "--until=shard", f"--address={cluster.http}", root=tmp_path, settings=LONG)
    client = subprocess.Popen(
        line, env=environment() | cluster.client, cwd=CHECKOUT, stderr=subprocess.PIPE, text=True
    )
    spec = shards(tmp_path, LONG)
    wait_for(lambda: len(receipts(spec)) > 2, client)
    client.send_signal(signal.SIGTERM)
    code, said = end(client)
    assert code == 130 and said.splitlines()[-1] == "darkroom: stopped; the same command resumes"
    (job,) = cluster.jobs_of(spec.folder)
    assert f"job {job} is stopped" in said and cluster.jobs()[job]["status"] == "STOPPED"
    kept = receipts(spec)
    assert 2 < len(kept) < SHARDS and not list(Path(spec.folder).rglob(".tmp-*"))
    assert not Path(spec.folder, "_meta", "lease.json").exists(), (
        "the driver ended by itself, and was not killed"
    )
    code, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    assert code == 0 and said.splitlines()[0] == f"shard is job {cluster.jobs_of(spec.folder)[1]}"
    assert kept.items() <= receipts(spec).items() and load_snapshot(spec.folder, spec.fingerprint)


@pytest.mark.faults
def test_a_run_that_is_submitted_needs_no_client_stops_tidily_and_goes_on_where_it_was(
    cluster, darkroom, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
    settings = LONG | {"source.count": 50 * 10 * SHARDS}
    line = ["submit", "demo", "--json", f"--address={cluster.http}"]
    first = result(darkroom(*line, root=tmp_path, settings=settings))
    assert first["job"] == f"{first['run']}-a1"
    spec = shards(tmp_path, settings)
    wait_for(lambda: len(receipts(spec)) > 2)
    assert result(darkroom(*line, root=tmp_path, settings=settings)) == first, "it is under way"
    cluster.stop(first["job"])
    wait_for(lambda: cluster.jobs()[first["job"]]["status"] == "STOPPED")
    kept = receipts(spec)
    assert 2 < len(kept) < 10 * SHARDS and not Path(spec.folder, "_meta", "lease.json").exists()
    again = result(darkroom(*line, root=tmp_path, settings=settings))
    assert again["job"] == f"{first['run']}-a2"
    wait_for(lambda: len(receipts(spec)) > len(kept))
    cluster.stop(again["job"])
    assert kept.items() <= receipts(spec).items()
    wait_for(lambda: cluster.jobs()[again["job"]]["status"] == "STOPPED")


# --- clients --------------------------------------------------------------------------------------------------------


def test_a_killed_client_leaves_its_job_and_the_next_one_adopts_it(cluster, tmp_path):
    spec = shards(tmp_path, LONG)
    first = start(spec, tmp_path, cluster.http, cluster.token)
    wait_for(lambda: receipts(spec), first)
    first.kill()
    first.communicate()
    before = len(receipts(spec))
    wait_for(lambda: len(receipts(spec)) > before + 2)
    second = start(spec, tmp_path, cluster.http, cluster.token)
    heard, said = second.communicate(timeout=300)
    (job,) = cluster.jobs_of(spec.folder)
    assert (second.returncode, said.splitlines()[0]) == (0, f"shard goes on as job {job}")
    assert '"done":0.0' in heard and f'"done":{50.0 * SHARDS}' in heard, (
        "the progress of before is told again"
    )
    assert len(cluster.jobs_of(spec.folder)) == 1


def test_two_clients_with_the_same_plan_share_one_job(cluster, tmp_path):
    spec = shards(tmp_path, SMALL)
    clients = [start(spec, tmp_path, cluster.http, cluster.token) for _ in range(2)]
    assert [end(client)[0] for client in clients] == [0, 0]
    assert len(cluster.jobs_of(spec.folder)) == 1


def test_another_root_is_another_job(cluster, tmp_path):
    specs = [shards(tmp_path / name, SMALL) for name in ("a", "b")]
    assert specs[0].fingerprint == specs[1].fingerprint
    for spec in specs:
        assert end(start(spec, tmp_path, cluster.http, cluster.token))[0] == 0
    (one,), (other,) = (cluster.jobs_of(spec.folder) for spec in specs)
    assert (
        one.rpartition("-a")[0] == other.rpartition("-a")[0] == f"shard-{specs[0].fingerprint}"
        and one != other
    )


# --- stopping a training --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(cluster, tmp_path_factory) -> StageSpec:
    """The spec of a tiny VAE's training that takes minutes and saves a checkpoint every thousand steps."""
    root = tmp_path_factory.mktemp("training")
    data = shards(root, {"source.count": 24, "shard.samples_per_shard": 24, "shard.image_size": 16})
    assert end(start(data, root, cluster.http, cluster.token))[0] == 0
    config = VaeConfig(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        max_steps=1_000_000,
        batch_size=6,
        num_workers=1,
        checkpoint_every=1_000_000,
        schedule="constant",
    )
    return StageSpec(
        stage="vae",
        config=config.model_dump(mode="json"),
        inputs={"data": InputRef(stage="shard", folder=data.folder, fingerprint=data.fingerprint)},
        folder=str(root / "store" / "vae" / "a"),
        fingerprint="f" * 12,
    )


@pytest.mark.faults
def test_a_stopped_training_saves_a_checkpoint_and_goes_on_from_it(cluster, training, tmp_path):
    client = start(training, tmp_path, cluster.http, cluster.token)
    metrics = Path(training.folder, "_meta", "tensorboard")
    wait_for(lambda: list(metrics.glob("events.*")), client)
    client.send_signal(signal.SIGINT)
    code, said = end(client)
    assert code == 130 and said.splitlines()[-1] == "stopped; the same command resumes", said
    (saved,) = Path(training.folder).glob("checkpoints/step_*")
    step = int(saved.name.removeprefix("step_"))
    assert "saving a checkpoint before the training stops" in said and 0 < step < 100_000
    assert cluster.jobs()[f"vae-{training.fingerprint}-a1"]["status"] == "STOPPED"

    end_of_training = {"max_steps": step + 20}
    rest = training.model_copy(update={"config": training.config | end_of_training})
    client = start(rest, tmp_path, cluster.http, cluster.token)
    heard, said = client.communicate(timeout=300)
    assert client.returncode == 0, said
    told = [json.loads(line.partition(" ")[2])["done"] for line in heard.splitlines() if "moved" in line]
    assert load_snapshot(training.folder, training.fingerprint)
    assert [n for n in told if 0 < n < step] == [], "no step was made again"


# --- what the cluster loses -----------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_lost_node_holds_no_job_up(cluster, tmp_path):
    spec = shards(tmp_path, LONG | {"fanout.num_workers": 2})
    node = cluster.add_node(num_cpus=1)
    client = start(spec, tmp_path, cluster.http, cluster.token)
    wait_for(lambda: any("_Worker" in title(pid) for pid in below(node.pid)) and receipts(spec), client)
    cluster.lose(node)
    kept = receipts(spec)
    assert end(client)[0] == 0 and len(kept) < SHARDS
    assert kept.items() <= receipts(spec).items() and load_snapshot(spec.folder, spec.fingerprint)


@pytest.mark.faults
def test_a_job_whose_head_is_lost_is_submitted_to_the_next_head_and_makes_nothing_twice(tmp_path):
    with ray_cluster() as cluster:
        head = cluster.start_head(num_cpus=1)
        spec = shards(tmp_path, LONG)
        client = start(spec, tmp_path, cluster.http, cluster.token)
        wait_for(lambda: receipts(spec), client)
        cluster.lose(head)
        kept = receipts(spec)
        cluster.start_head(num_cpus=1)
        code, said = end(client)
        assert code == 0 and "does not know job" in said and len(kept) < SHARDS
        assert len(cluster.jobs_of(spec.folder)) == 1
    assert kept.items() <= receipts(spec).items() and load_snapshot(spec.folder, spec.fingerprint)


@pytest.mark.faults
def test_a_head_that_does_not_come_back_ends_the_wait_with_what_to_do(tmp_path):
    with ray_cluster() as cluster:
        head = cluster.start_head(num_cpus=1)
        spec = shards(tmp_path, LONG, jobs=JobsConfig(silence_seconds=5))
        client = start(spec, tmp_path, cluster.http, cluster.token)
        wait_for(lambda: receipts(spec), client)
        cluster.lose(head)
        code, said = end(client)
    assert code == 1 and "has not answered for 5 s" in said and "the same command goes on" in said


# --- what is refused ------------------------------------------------------------------------------------------------


def test_the_error_of_a_stage_is_the_one_sentence_that_it_would_be_here(cluster, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"file_name": "a.png", "text": "nothing there"}\n')
    settings = {"source.kind": "auto", "source.path": tmp_path / "pairs.jsonl"}
    client = start(shards(tmp_path / "root", settings), tmp_path / "root", cluster.http, cluster.token)
    code, said = end(client)
    here = start(shards(tmp_path / "here", settings), tmp_path / "here", "local", None)
    assert (code, said.splitlines()[-1]) == (2, end(here)[1].splitlines()[-1])
    assert "none of the 1 rows of" in said


def test_what_the_cluster_can_never_run_is_refused_before_the_first_stage_begins(cluster, tmp_path):
    spec = shards(tmp_path, SMALL)
    settings = VaeConfig(num_workers=64, batch_size=64).model_dump(mode="json")
    later = spec.model_copy(update={"stage": "vae", "config": settings, "version": 1})
    (tmp_path / "later.json").write_text(later.model_dump_json())
    client = start(spec, tmp_path, cluster.http, cluster.token, f"--then={tmp_path / 'later.json'}")
    code, said = end(client)
    assert code == 2 and not receipts(spec)
    assert (
        "vae.num_workers=64, but the cluster has 0 GPUs and 1 CPUs: use at most 1, or name the nodes" in said
    )


def test_a_driver_that_no_node_has_room_for_is_given_up_with_what_it_waits_for(cluster, tmp_path):
    spec = shards(tmp_path, SMALL, jobs=JobsConfig(driver_cpus=64, start_seconds=5))
    code, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    assert code == 1 and "did not begin within 5 s" in said and "it waits for 64 CPUs of one node" in said
    mended = spec.model_copy(update={"jobs": JobsConfig()})
    code, said = end(start(mended, tmp_path, cluster.http, cluster.token))
    assert code == 0 and len(cluster.jobs_of(spec.folder)) == 2, "what waits for too much is not adopted"


@pytest.mark.faults
def test_a_job_that_tells_nothing_any_more_is_stopped(cluster, tmp_path):
    spec = shards(tmp_path, LONG | {"fanout.stall_seconds": 20})
    client = start(spec, tmp_path, cluster.http, cluster.token)
    wait_for(lambda: receipts(spec), client)
    (driver,) = [
        pid
        for pid in below(cluster.nodes[0].pid)
        if f"{spec.folder}/" in title(pid) and "-c" not in title(pid)
    ]
    os.kill(driver, signal.SIGSTOP)
    code, said = end(client)
    os.kill(driver, signal.SIGKILL)
    assert code == 1 and "has told nothing for 35 s (fanout.stall_seconds), and was stopped" in said


def test_a_wrong_token_and_none_at_all_are_one_sentence_each(cluster, tmp_path):
    spec = shards(tmp_path, SMALL)
    for address in (cluster.http, f"127.0.0.1:{cluster.port}"):
        code, said = end(start(spec, tmp_path, address, "0" * 32))
        assert (code, said.count("\n")) == (2, 1), said
        assert "does not take this token: set RAY_AUTH_TOKEN" in said
        code, said = end(start(spec, tmp_path, address, None))
        assert (code, said.count("\n")) == (2, 1), said
        assert "wants a token: set RAY_AUTH_MODE=token" in said
    assert cluster.jobs_of(spec.folder) == []


def test_an_interpreter_without_darkroom_is_named_with_what_to_do(cluster, tmp_path):
    spec = shards(tmp_path, SMALL, jobs=JobsConfig(python="/nowhere/python"))
    code, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    assert code == 2 and "cannot run `/nowhere/python -m stages`" in said and "jobs.python" in said


def test_lines_for_programs_name_the_run_and_the_stage_of_a_job(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_LOG", "json")
    spec = shards(tmp_path, SMALL, jobs=JobsConfig(python="/nowhere/python"), run="demo-1")
    _, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    first, *_ = map(json.loads, said.splitlines())
    assert first["message"].startswith("shard is job shard-")
    assert (first["run"], first["stage"]) == ("demo-1", "shard")


def test_code_that_is_sent_along_runs_and_another_version_of_a_stage_is_refused(cluster, tmp_path):
    code = tmp_path / "code"
    for package in ("data", "training", "stages"):
        shutil.copytree(CHECKOUT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    spec = shards(tmp_path, SMALL, jobs=JobsConfig(working_dir=str(code)))
    ended, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    assert ended == 0, said
    changed = (code / "stages" / "shard.py").read_text().replace("    version=2,", "    version=99,")
    (code / "stages" / "shard.py").write_text(changed)
    Path(spec.folder, "_meta", "snapshots", f"{spec.fingerprint}.json").unlink()
    ended, said = end(start(spec, tmp_path, cluster.http, cluster.token))
    assert (
        ended == 2 and "is for version 2 of stage shard, and the Darkroom that runs it has version 99" in said
    )


class Elsewhere(BaseHTTPRequestHandler):
    """A job server of another Ray, as far as the first question goes: two of Ray do not fit into one environment."""

    ANSWERS: ClassVar = {
        "/api/version": b'{"ray_version": "2.9.3", "version": "4"}',
        "/prefect/api/version": b'"3.8.8"',
    }

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.ANSWERS.get(self.path, b"<html>"))

    def log_message(self, *_: object) -> None:
        pass


def test_an_address_without_a_fitting_job_server_is_one_sentence(tmp_path):
    spec = shards(tmp_path, SMALL)
    code, said = end(start(spec, tmp_path, f"http://127.0.0.1:{free_port()}", None))
    assert (code, said.count("\n")) == (2, 1) and "no job server of a Ray cluster answers there" in said
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        code, said = end(start(spec, tmp_path, address, None))
        assert (code, said.count("\n")) == (
            2,
            1,
        ) and "runs Ray 2.9.3, and this Darkroom needs Ray 2.6" in said
        for other in ("other", "prefect"):
            code, said = end(start(spec, tmp_path, f"{address}/{other}", None))
            assert (code, said.count("\n")) == (2, 1), said
            assert "no job server of a Ray cluster answers there" in said
    finally:
        server.shutdown()
        server.server_close()
