"""`darkroom serve`: one command that keeps a schedule on one machine, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import CHECKOUT, environment

from flows import cli, serving


@pytest.fixture
def file(tmp_path) -> Path:
    """A file of one deployment that nothing starts."""
    one = {
        "name": "darkroom",
        "entrypoint": "flows.deployed.gc",
        "work_pool": {"name": "darkroom"},
        "parameters": {"run": {}},
    }
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump({"deployments": [one]}))
    return path


def test_a_port_that_is_taken_is_one_sentence(tmp_path, capsys):
    with socket.socket() as listening:
        listening.bind((serving.HOST, 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert cli.main(["serve", f"--root={tmp_path}", f"--port={port}"]) == 2
    assert capsys.readouterr().err == (
        f"darkroom: --port {port} is taken on 127.0.0.1: end what listens there, or give another port\n"
    )


def test_deploying_without_a_server_is_one_sentence(tmp_path, file, capsys):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    deploy = ["deploy", f"--root={tmp_path}", f"--file={file}"]
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert cli.main(deploy) == 2
        assert "no Prefect server is named: set PREFECT_API_URL" in capsys.readouterr().err
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert cli.main(deploy) == 2
        assert (
            "PREFECT_API_URL=http://127.0.0.1:9/api: no Prefect server answers there"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("deployments: {", "is no YAML"),
        (
            "deployments: [{name: a}]",
            "`deployments` must be a list, each with name, entrypoint and work_pool.name",
        ),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_cannot_be_applied_is_one_sentence(tmp_path, text, sentence, capsys):
    file = tmp_path / "prefect.yaml"
    if text:
        file.write_text(text)
    assert cli.main(["deploy", f"--root={tmp_path}", f"--file={file}"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_serves_until_it_is_told_to_end_and_leaves_no_process(tmp_path, file):
    from prefect_server import ended, eventually, free_port, processes_under, start, talking_to

    port, log = free_port(), tmp_path / "serve.log"
    line = [sys.executable, "-m", "flows.cli", "serve", f"--root={tmp_path / 'runs'}", f"--port={port}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*line, f"--file={file}"], cwd=CHECKOUT, env=environment(), stdout=out, stderr=out
        )
    try:
        eventually(lambda: "Ctrl-C ends it" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        assert "gc/darkroom" in log.read_text()
        with talking_to(f"http://127.0.0.1:{port}/api"):
            state = ended(start("gc/darkroom"))
        assert state.name == "Completed" and state.message.startswith("0 artifacts and 0 runs went")
        children = processes_under(process.pid)
        assert len(children) >= 2, "a server and a worker"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        if process.poll() is None:
            for pid in processes_under(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.kill()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"entrypoint": "flows.deployed.nothing"}, "no flow can be imported from there"),
        ({"entrypoint": 3}, "no flow can be imported from there"),
        ({"name": "a/b"}, "'a/b' names no deployment or pool"),
        ({"work_pool": {"name": 3}}, "3 names no deployment or pool"),
        ({"work_pool": {"name": "a", "job_variables": 3}}, "'int' object is not iterable"),
        ({"parameters": 3}, "'int' object has no attribute 'get'"),
        ({"parameters": {"run": "all"}}, "'str' object is not a mapping"),
        ({"parameters": {"run": {}, "runs": 3}}, "the flow has no parameter runs, only run"),
        ({"parameters": {"run": {"keep_run": 3}}}, "'keep_run' was unexpected"),
        ({"concurrency_limit": {"limit": 1, "collision_strategy": "WAIT"}}, "collision_strategy: Input should be"),
        ({"schedules": ["daily"]}, "schedule daily: "),
        ({"schedules": [{"slug": "a", "cron": "never"}]}, 'Invalid cron string: "never"'),
        ({"schedules": [{"slug": "a", "interval": 1e20}]}, "it needs a slug and one of cron"),
        ({"schedules": [{"slug": "a", "interval": 60, "parameters": {"run": {"x": 1}}}]}, "'x' was unexpected"),
    ],
)  # fmt: skip
def test_a_deployment_that_cannot_be_is_one_sentence_before_any_is_made(file, change, sentence, capsys):
    (one,) = yaml.safe_load(file.read_text())["deployments"]
    file.write_text(yaml.safe_dump({"deployments": [one, one | change]}))
    assert cli.main(["deploy", f"--root={file.parent}", f"--file={file}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1, said
