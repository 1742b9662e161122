"""Deployed flows on a real Prefect server (SQLite, loopback) with a real process worker."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from data.errors import UserError
from data.lease import holder, lease
from flows import cli, deployed, serving
from flows.deploying import FILE, Applied
from flows.deploying import deploy as apply
from flows.parameters import PrepareParameters

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import add_pictures
from prefect_server import (
    artifacts,
    deploy,
    ended,
    entry,
    eventually,
    free_port,
    log,
    prefect_server,
    runs_of,
    start,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.usefixtures("server")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server and a worker of its pool; the file of the checkout is applied. Yields (API URL, the worker's home)."""
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as url:
        apply(FILE, {"root": "/nowhere"})
        with serving.worker(home, url, "darkroom"):
            yield url, home


def told(applied: list[Applied], name: str) -> Applied:
    """What was done about `name`."""
    (found,) = [each for each in applied if each.name == name]
    return found


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of 12 captioned pictures."""
    return add_pictures(tmp_path / "pictures", range(12))


def test_deploying_again_changes_nothing_and_a_change_is_told(tmp_path):
    run = {"recipe": "demo", "root": "/a"}
    cron = {"slug": "nightly", "cron": "0 2 * * *", "timezone": "UTC"}
    weekly = {"slug": "weekly", "interval": 604800}
    monthly = {"slug": "monthly", "rrule": "FREQ=MONTHLY;BYDAY=1SA"}
    first = deploy(tmp_path, entry("pipeline", "twice", run, cron, weekly, monthly))
    assert told(first, "pipeline/twice").change == "created"
    again = deploy(tmp_path, entry("pipeline", "twice", run, cron, weekly, monthly))
    assert told(again, "pipeline/twice").change == "unchanged"
    assert {each.change for each in again} == {"unchanged", "not in the file"}
    changed = told(
        deploy(
            tmp_path, entry("pipeline", "twice", run | {"root": "/b"}, cron | {"cron": "0 3 * * *"}, weekly)
        ),
        "pipeline/twice",
    )
    assert changed.change == "changed"
    assert changed.details == ("parameters", "schedule monthly", "schedule nightly")


def test_a_deployment_that_left_the_file_is_told_and_goes_when_it_is_asked_to(tmp_path, capsys):
    seldom = {"slug": "seldom", "interval": 30 * 86400, "active": True}
    theirs = entry("gc", "theirs", {"root": "/a"}) | {"tags": ["of another team"]}
    deploy(tmp_path, entry("gc", "left", {"root": "/a"}, seldom), theirs)
    planned = eventually(lambda: runs_of("gc/left"), 60)
    line = ["deploy", "--root=/nowhere"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert re.search(r"gc/left +not in the file", said) and "--prune removes what is not in the file" in said
    assert cli.main([*line, "--prune"]) == 0
    assert re.search(r"gc/left +removed", capsys.readouterr().out)
    assert cli.main([*line, "--prune"]) == 0
    assert capsys.readouterr().out.endswith("nothing to do: the server holds all of it\n")
    with pytest.raises(ObjectNotFound):
        runs_of("gc/left")
    chosen = FlowRunFilter.model_validate({"id": {"any_": [run.id for run in planned]}})
    with get_client(sync_client=True) as client:
        left = client.read_flow_runs(flow_run_filter=chosen, limit=200, sort="NAME_ASC")
    assert left == [], "what its schedule had planned"
    assert runs_of("gc/theirs") == []


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"recipe": "dmeo", "root": "/a"}, "'dmeo' is not one of ['demo', 'unclip']"),
        ({"recipe": "demo"}, "'root' is a required property"),
        ({"recipe": "demo", "root": "runs"}, "'runs' does not match"),
        ({"recipe": "demo", "root": "/a", "settings": {"clip.max_steps": -5}}, "-5 is less than the minimum of 1"),
        ({"recipe": "demo", "root": "/a", "settings": {"clip.max_step": 5}}, "no recipe has such a setting"),
        ({"recipe": "demo", "root": "/a", "adress": "auto"}, "'adress' was unexpected"),
    ],
)  # fmt: skip
def test_the_server_refuses_parameters_that_cannot_be(run, reason):
    with pytest.raises(PrefectHTTPStatusError, match="409") as refused:
        start("pipeline/darkroom", run)
    assert reason in refused.value.response.json()["detail"]


def test_a_run_makes_what_the_command_makes_and_leaves_its_artifacts(pictures, tmp_path):
    root = tmp_path / "runs"
    run = start(
        "prepare/darkroom", {"data": str(pictures), "root": str(root), "settings": {"shard.image_size": 32}}
    )
    state = ended(run)
    assert state.name == "Completed", state.message
    assert state.message.startswith("prepare-") and state.message.endswith(": ran shard")
    made = next((root / "store" / "shard").iterdir())
    assert (made / "00000.tar").is_file()
    found = artifacts(run)
    assert set(found) == {"prepare-plan", "prepare-ledger", "prepare-lineage"}
    assert '"attempted": 12, "written": 12' in found["prepare-ledger"]
    eventually(
        lambda: any(line.startswith("shard     done in") for line in log(run)), 30, lambda: str(log(run))
    )


def test_lines_for_programs_name_run_stage_and_shard_in_the_workers_log(server, pictures, tmp_path):
    _, home = server
    asked = entry("prepare", "for-programs", {"data": str(pictures), "root": str(tmp_path / "runs")})
    asked["work_pool"]["job_variables"]["env"]["DARKROOM_LOG"] = "json"
    deploy(tmp_path, asked)
    run = start("prepare/for-programs")
    name = ended(run).message.partition(":")[0]

    def done() -> list[dict]:
        lines = [
            line for line in (home / "worker.log").read_text().splitlines() if line.startswith('{"time"')
        ]
        return [line for line in map(json.loads, lines) if "shard" in line]

    (line,) = eventually(done, 30, lambda: (home / "worker.log").read_text())
    assert (line["run"], line["stage"], line["shard"], line["level"]) == (name, "shard", 0, "debug")
    assert line["message"].startswith("done, 12 samples in ")
    assert not any("done, 12 samples" in said for said in log(run)), "people are told what they need alone"


def test_of_two_deployments_that_would_make_the_same_run_the_later_gives_way(pictures, tmp_path):
    root = str(tmp_path / "runs")
    run = {"data": str(pictures), "root": root, "settings": {"shard.image_size": 32}}
    deploy(tmp_path, *(entry("prepare", name, run) for name in ("nightly", "by-hand")))
    plan = PrepareParameters.model_validate(run).plan()
    with lease(plan.stages[0].folder):  # what the first one waits for, for as long as this test likes
        first = start("prepare/nightly")
        owner = eventually(lambda: holder(f"{root}/{plan.run}"))
        later = ended(start("prepare/by-hand"))
        collected = ended(start("gc/darkroom", {"root": root}))
    assert later.name == "Cancelled"
    assert later.message == (
        f"{plan.run} under {root} is being made by flow run prepare/{first.name} (process {owner.pid} on {owner.host}): "
        "start this one again when that one has ended"
    )
    assert collected.name == "Cancelled" and "nothing was removed; wait for it" in collected.message
    assert ended(first).name == "Completed"
    again = ended(start("prepare/by-hand"))
    assert again.message == f"{plan.run}: nothing to do, every stage is cached"


def test_what_cannot_be_done_is_one_sentence_of_the_run_and_tells_no_credentials():
    run = start("prepare/darkroom", {"data": "/nowhere", "root": "s3://key:planted@bucket/runs"})
    state = ended(run)
    assert state.name == "Failed" and "root names s3://***@bucket/runs" in state.message
    assert "Traceback" not in state.message
    assert "planted" not in state.message + "\n".join(log(run))


def test_a_cluster_that_answers_later_is_waited_for_and_none_is_one_sentence():
    port = free_port()
    reach = deployed.reach.with_options(retry_delay_seconds=2, retries=2)

    @flow(persist_result=False)
    def ask() -> None:
        reach(f"127.0.0.1:{port}")

    with pytest.raises(UserError, match=f"address 127.0.0.1:{port}: no Ray cluster answers there"):
        ask()
    with socket.socket() as later:
        later.bind(("127.0.0.1", port))
        opened = threading.Timer(3.0, later.listen)
        opened.start()
        ask()
        opened.join()
