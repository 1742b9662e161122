"""The images: pinned, without root, small to rebuild; what they install is installed here, by the same script."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.infra.conftest import CHECKOUT, INFRA, is_pinned, pinned

DOCKER = INFRA / "docker"
HEALTHY = DOCKER / "healthy.py"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in lines) if word]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Name of a build stage -> its instructions, the FROM first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            name = rest.split(" AS ")[1]
            found[name] = []
        found[name].append((word, rest))
    return found


def test_every_base_is_one_exact_version_or_an_earlier_stage():
    bases = [stage[0][1].split(" AS ")[0] for stage in stages().values()]
    assert all(base in stages() or is_pinned(base) for base in bases)
    assert {base for base in bases if base not in stages()} == {"python:3.11.14-slim-bookworm"}


def test_both_targets_end_as_a_user_without_rights_and_name_a_health_check():
    assert [name for name in stages() if name != "packages"] == ["cpu", "cuda"]
    for name in ("cpu", "cuda"):
        assert [rest for word, rest in stages()[name] if word == "USER"][-1] == "1000:1000"
    words = [word for word, _ in stages()["cpu"]]
    assert "HEALTHCHECK" in words and stages()["cuda"][0][1].startswith("cpu ")


def test_the_packages_are_a_layer_that_a_change_of_code_leaves_alone():
    copied = {rest for word, rest in stages()["packages"] if word == "COPY"}
    assert copied == {"pyproject.toml constraints.txt infra/docker/install.sh ./"}
    order = [rest for word, rest in stages()["cpu"] if word in ("COPY", "RUN")]
    packages = order.index("--from=packages /opt/venv /opt/venv")
    assert packages < order.index(". .")


def test_nothing_is_fetched_but_packages_and_no_secret_is_built_in():
    text = (DOCKER / "Dockerfile").read_text()
    assert not re.search(r"\b(ADD|curl|wget|ARG)\b", text)
    assert not re.search(r"PASSWORD|TOKEN|SECRET|KEY", text)


def test_the_context_holds_what_is_built_from_and_nothing_else():
    lines = [
        line
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "**", "what is not named stays out"
    let_in = [line[1:] for line in lines if line.startswith("!")]
    needed = [
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "data/schema.py",
        "flows/cli.py",
        "infra/docker/install.sh",
    ]
    assert all(any(fnmatch.fnmatch(path, pattern) for pattern in let_in) for path in needed)
    private = [".git/config", "infra/compose.env", "runs/latest", ".venv/pyvenv.cfg", "tests/conftest.py"]
    assert not any(fnmatch.fnmatch(path, pattern) for path in private for pattern in let_in)


@pytest.fixture
def answering():
    """(status) -> the address of a server that answers with it."""
    servers = []

    def serve(status: int) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def check_health(*urls: str) -> int:
    """The exit code of the images' health check."""
    environment = os.environ | {"DARKROOM_HEALTH": " ".join(urls)}
    return subprocess.run(
        [sys.executable, str(HEALTHY)], env=environment, capture_output=True, timeout=60
    ).returncode


def test_healthy_means_that_everything_it_serves_answers(answering):
    good, bad = answering(200), answering(503)
    assert check_health() == 0, "a job serves nothing"
    assert check_health(good) == 0
    assert check_health(good, bad) == 1
    assert check_health("http://127.0.0.1:9/") == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_install_script_makes_a_working_command_at_the_pinned_versions(tmp_path):
    """In an empty folder, as in the image's build: first the packages, then the code."""
    for name in ("pyproject.toml", "constraints.txt", "README.md"):
        shutil.copy(CHECKOUT / name, tmp_path)
    script, venv = shutil.copy(DOCKER / "install.sh", tmp_path), tmp_path / "venv"
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str | Path) -> str:
        finished = subprocess.run(
            command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=1200
        )
        assert finished.returncode == 0, finished.stderr[-3000:]
        return finished.stdout

    run(script, "packages", venv)
    for floor in ("data", "training", "stages", "flows"):
        shutil.copytree(CHECKOUT / floor, tmp_path / floor)
    run(script, "code", venv)
    imported = run(venv / "bin" / "python", "-c", "import flows, sys; sys.stdout.write(flows.__file__)")
    assert imported == str(tmp_path / "flows" / "__init__.py")
    assert "demo" in run(venv / "bin" / "darkroom", "recipes")
    assert "pending" in run(venv / "bin" / "darkroom", "plan", "demo", f"--root={tmp_path / 'runs'}")
    assert "SPEC_URI" in run(venv / "bin" / "python", "-m", "stages", "--help")
    listed = run(venv / "bin" / "uv", "pip", "list", "--format=freeze", f"--python={venv / 'bin' / 'python'}")
    versions = dict(line.split("==") for line in listed.splitlines() if "==" in line)
    for package in ("ray", "prefect", "torch", "torchvision", "s3fs", "boto3", "asyncpg"):
        assert versions[package].partition("+")[0] == pinned(package)
    assert "pytest" not in versions, "what only the tests need stays out"
