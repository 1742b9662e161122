"""What is submitted as a job, and what it says of itself; the jobs themselves are in `tests/test_jobs.py`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from stages import jobs
from stages.contract import STOP_SECONDS, STOPPING_SECONDS, JobsConfig, StageSpec, stopping_seconds


def test_only_addresses_of_the_web_are_job_servers():
    told = {
        address: jobs.is_job_server(address)
        for address in ("local", "auto", "10.0.0.1:6379", "http://h:1", "https://h")
    }
    assert [address for address, is_server in told.items() if is_server] == ["http://h:1", "https://h"]


def test_a_stage_is_submitted_by_a_spec_beside_its_artifact(tmp_path):
    spec = StageSpec(
        stage="shard", config={"a": 1}, inputs={}, folder=str(tmp_path / "a b"), fingerprint="f" * 12
    )
    later = spec.model_copy(update={"folder": str(tmp_path / "c")})
    asked = jobs._stage_request(spec, [later])
    python, _, module, uri, *options = shlex.split(asked["entrypoint"])
    assert (python, module) == ("python", "stages")
    assert StageSpec.model_validate_json(Path(uri).read_text()) == spec
    assert options == [
        "--address",
        "auto",
        "--journal",
        "--then",
        f"{later.folder}/_meta/specs/{'f' * 12}.json",
    ]
    assert asked["metadata"]["makes"] == uri and asked["entrypoint_num_cpus"] == 0


def test_a_token_is_in_nothing_that_is_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-secret")
    spec = StageSpec(stage="shard", config={}, inputs={}, folder=str(tmp_path), fingerprint="f" * 12)
    assert "a-secret" not in str(jobs._stage_request(spec, []))
    assert not [path for path in tmp_path.rglob("*.json") if "a-secret" in path.read_text()]


def test_a_job_is_given_more_time_to_stop_than_its_stage_takes():
    wait = jobs.request("a", ["b"], JobsConfig())["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(wait) == STOP_SECONDS >= STOPPING_SECONDS + 10


def test_what_stops_a_run_after_another_time_may_say_so(monkeypatch):
    monkeypatch.delenv("DARKROOM_STOPPING_SECONDS", raising=False)
    assert stopping_seconds() == STOPPING_SECONDS
    monkeypatch.setenv("DARKROOM_STOPPING_SECONDS", "25")
    assert stopping_seconds() == 25


@pytest.mark.parametrize(("folder", "sent"), [(None, False), ("/code", True)])
def test_code_is_sent_where_a_folder_is_named(folder, sent):
    asked = jobs.request("a", ["-m", "b"], JobsConfig(working_dir=folder, python="/opt/py", driver_cpus=2))
    assert ("working_dir" in asked["runtime_env"]) == sent
    assert asked["entrypoint"] == "/opt/py -m b" and asked["entrypoint_num_cpus"] == 2
