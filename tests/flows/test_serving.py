"""`darkroom serve`: one command that keeps a schedule on one machine, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import CHECKOUT, environment

from data.lease import lease
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


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_refused(tmp_path, port, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", f"--root={tmp_path}", f"--port={port}"])
    assert ended.value.code == 2 and f"{port} is no port: write" in capsys.readouterr().err


def test_a_home_that_is_a_file_or_serves_already_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["serve", f"--root={tmp_path}", f"--home={tmp_path}/file"]) == 2
    assert capsys.readouterr().err == (
        f"darkroom: --home {tmp_path}/file is no folder and cannot become one: give another\n"
    )
    with lease(str(tmp_path / "home")):
        assert cli.main(["serve", f"--root={tmp_path}", f"--home={tmp_path}/home"]) == 2
    said = capsys.readouterr().err
    assert f"process {os.getpid()} on " in said and f"serves from {tmp_path}/home already: end it" in said


def test_a_deployment_that_is_there_twice_is_refused(tmp_path, file, capsys):
    (one,) = yaml.safe_load(file.read_text())["deployments"]
    file.write_text(yaml.safe_dump({"deployments": [one, one | {"tags": ["another"]}]}))
    assert cli.main(["deploy", f"--root={tmp_path}", f"--file={file}"]) == 2
    assert (
        "gc/darkroom is there twice: give each deployment of a flow its own name" in capsys.readouterr().err
    )


def test_a_server_whose_pages_answer_to_everything_is_no_api(tmp_path, file, capsys):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Prefect</title>")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((serving.HOST, 0), Page) as pages:
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        url = f"http://{serving.HOST}:{pages.server_port}"
        with temporary_settings({PREFECT_API_URL: url}):
            assert cli.main(["deploy", f"--root={tmp_path}", f"--file={file}"]) == 2
        pages.shutdown()
    assert capsys.readouterr().err == (
        f"darkroom: PREFECT_API_URL={url}: no Prefect server answers there (it answers with a page: an address of the API ends "
        "in /api)\n"
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
        ("deployments: {}", "`deployments` must be a list"),
        ("deployments: " + "[" * 10_000, "is no YAML"),
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
def test_it_serves_until_it_is_told_to_end_and_leaves_no_process_even_of_one_that_was_killed(tmp_path, file):
    from prefect_server import ended, eventually, free_port, processes_under, start, talking_to

    port, log = free_port(), tmp_path / "serve.log"
    line = [sys.executable, "-m", "flows.cli", "serve", f"--root={tmp_path / 'runs'}", f"--port={port}"]

    def served() -> subprocess.Popen[bytes]:
        with log.open("w") as out:
            process = subprocess.Popen(
                [*line, f"--file={file}"], cwd=CHECKOUT, env=environment(), stdout=out, stderr=out
            )
        eventually(lambda: "Ctrl-C ends it" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        return process

    process = served()
    left = processes_under(process.pid)
    try:
        assert "gc/darkroom" in log.read_text()
        process.kill()
        process.wait()
        process = served()
        assert not [pid for pid in left if serving._lives(pid)], "of the one that was killed"
        with talking_to(f"http://127.0.0.1:{port}/api"):
            state = ended(start("gc/darkroom"))
        assert state.name == "Completed" and state.message.startswith("0 artifacts and 0 runs went")
        children = processes_under(process.pid)
        assert len(children) >= 2, "a server and a worker"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    finally:
        for pid in (*left, *processes_under(process.pid)):
            with suppress(ProcessLookupError):
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
        ({"paramters": {"run": {}}}, "paramters is not applied, only name, entrypoint, "),
        ({"work_pool": {"name": "a", "work_queue_name": "b"}}, "work_queue_name is not applied, only name, job_variables"),
        ({"schedules": [{"slug": "a", "cron": "0 2 * * *", "time_zone": "UTC"}]}, "time_zone is not applied"),
        ({"schedules": [{"slug": "a", "cron": "0 2 * * *", "interval": 60}]}, "it needs a slug and one of cron"),
        ({"schedules": [{"slug": None, "cron": "0 2 * * *"}]}, "it needs a slug and one of cron"),
        ({"schedules": [{"slug": "a", "cron": "0 2 * * *", "timezone": "Mars/Base"}]}, "timezone"),
        ({"schedules": [{"slug": "a", "interval": 0}]}, "it needs a slug and one of cron"),
        ({"schedules": [{"slug": "a", "rrule": "FREQ=SOMETIMES"}]}, "it needs a slug and one of cron"),
        ({"schedules": 2 * [{"slug": "a", "interval": 60}]}, "schedules a, a: give each its own slug"),
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
