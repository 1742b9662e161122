"""What infra/compose.yaml starts, started here without containers: its commands, its environment and its health checks, word for
word but for addresses and ports, which on one machine must differ."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.infra.conftest import CHECKOUT, INFRA, pinned
from tests.infra.test_compose import VARIABLE
from tests.ray_cluster import below, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OWN_PORTS = {"8080", "52365"}
"""Each container has them for itself."""
SHARED_PORTS = {"5432", "4200", "8333", "6379", "8265"}
HOSTS = re.compile(r"\b(postgres|prefect-server|s3|ray-head)(?=:|$)|\b0\.0\.0\.0\b")
SECRETS = {
    "POSTGRES_PASSWORD": "a1",
    "PREFECT_PASSWORD": "b2",
    "RAY_AUTH_TOKEN": "c3" * 16,
    "S3_SECRET_KEY": "d4",
}
PATIENCE_SECONDS = 300


class House:
    """The services of a compose file as processes of this machine."""

    def __init__(self, services: dict[str, Any], folder: Path) -> None:
        self.services, self.folder = services, folder
        self.ports = {port: str(free_port()) for port in sorted(SHARED_PORTS)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str, service: str) -> str:
        """`text` of the file, as it has to be on this machine."""
        text = VARIABLE.sub(lambda found: SECRETS.get(found[1]) or (found[2] or "").removeprefix(":-"), text)
        text = HOSTS.sub("127.0.0.1", text)
        return re.sub(r"\b\d{4,5}\b", lambda found: self._port(found[0], service), text)

    def _port(self, number: str, service: str) -> str:
        own = (
            self.ports.setdefault(f"{service} {number}", str(free_port())) if number in OWN_PORTS else number
        )
        return self.ports.get(number, own)

    def environment(self, service: str) -> dict[str, str]:
        """What the service's container has, and no more of this machine's than it needs to be found here."""
        given = self.services[service]["environment"]
        home = self.folder / service
        home.mkdir(exist_ok=True)
        return {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "PYTHONPATH": str(CHECKOUT),
            "RAY_TMPDIR": str(self.folder),
            "PREFECT_WORKER_WEBSERVER_PORT": self._port("8080", service),
            "OMP_NUM_THREADS": "1",
        } | {name: self.here(value, service) for name, value in given.items()}

    def start(self, service: str, *extra: str) -> None:
        """Runs the service's command until its health check passes."""
        command = [self.here(word, service) for word in self.services[service]["command"]]
        with (self.folder / f"{service}.log").open("wb") as said:
            self.running[service] = subprocess.Popen(
                [*command, *extra],
                env=self.environment(service),
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._is_sick(service):
            assert self.running[service].poll() is None and time.monotonic() < deadline, self.said(service)
            time.sleep(1)

    def _is_sick(self, service: str) -> bool:
        checked = [sys.executable, str(INFRA / "docker" / "healthy.py")]
        return (
            subprocess.run(checked, env=self.environment(service), capture_output=True, timeout=60).returncode
            != 0
        )

    def said(self, service: str) -> str:
        return f"{service}: {(self.folder / f'{service}.log').read_text(errors='replace')[-3000:]}"

    def stop(self) -> None:
        for process in reversed(self.running.values()):
            for pid in [process.pid, *below(process.pid)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def run(self, service: str, *command: str) -> str:
        """What `command` says in the service's container."""
        finished = subprocess.run(
            command,
            env=self.environment(service),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    def get(self, port: str, path: str, authorization: str | None = None) -> tuple[int, Any]:
        """(status, document) of an address that is published."""
        headers = {"Authorization": authorization} if authorization else {}
        ask = urllib.request.Request(f"http://127.0.0.1:{self.ports[port]}{path}", headers=headers)
        try:
            with urllib.request.urlopen(ask, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, None


def _postgres(folder: Path, port: str, stack: ExitStack) -> None:
    """The database as its image makes it: the user and database `prefect`, let in by password."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL on this machine (Debian's package: postgresql)")
    as_other = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
    home = folder / "postgres"
    home.mkdir()
    (home / "password").write_text(SECRETS["POSTGRES_PASSWORD"])
    if as_other:
        folder.chmod(0o755)
        for path in (home, home / "password"):
            shutil.chown(path, "postgres", "postgres")
    initdb = [f"{programs[-1]}/initdb", f"--pgdata={home}/data", "--username=prefect", "--auth=scram-sha-256"]
    subprocess.run(
        [*as_other, *initdb, f"--pwfile={home}/password"], check=True, capture_output=True, cwd=home
    )
    options = [
        "-D",
        f"{home}/data",
        "-p",
        port,
        "-c",
        "listen_addresses=127.0.0.1",
        "-k",
        str(home),
        "-c",
        "fsync=off",
    ]
    server = subprocess.Popen(
        [*as_other, f"{programs[-1]}/postgres", *options], cwd=home, stderr=subprocess.DEVNULL
    )
    stack.callback(server.wait)
    stack.callback(lambda: [os.kill(pid, signal.SIGQUIT) for pid in below(server.pid)[:1] or [server.pid]])
    outside = os.environ | {"PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
    create = [
        f"{programs[-1]}/createdb",
        "--host=127.0.0.1",
        f"--port={port}",
        "--username=prefect",
        "prefect",
    ]
    deadline = time.monotonic() + 60
    while subprocess.run(create, env=outside, capture_output=True).returncode:
        assert time.monotonic() < deadline, "PostgreSQL did not start"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def house(compose: dict[str, Any]) -> Iterator[House]:
    """Everything up and healthy, in the order that `depends_on` gives."""
    folder = Path(
        tempfile.mkdtemp(prefix="house-", dir="/tmp")
    )  # sockets lie below it: their paths have to be short
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        made = House(compose["services"], folder)
        _postgres(folder, made.ports["5432"], stack)
        _store(made.ports["8333"], stack)
        stack.callback(made.stop)
        made.start("prefect-server")
        small = ["--object-store-memory=100000000", "--min-worker-port=0", "--max-worker-port=0"]
        agent = lambda name: f"--dashboard-agent-listen-port={made._port('52365', name)}"  # noqa: E731
        head = [f"--dashboard-port={made.ports['8265']}", f"--ray-client-server-port={free_port()}"]
        made.start("ray-head", agent("ray-head"), *head, *small)
        made.start("ray-worker", agent("ray-worker"), *small)
        made.start("prefect-worker")
        yield made


def _store(port: str, stack: ExitStack) -> None:
    """An S3-speaking server with the bucket that the real one is told to make."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=int(port), verbose=False
    )
    server.start()
    stack.callback(server.stop)
    urllib.request.urlopen(
        urllib.request.Request(f"http://127.0.0.1:{port}/darkroom", method="PUT"), timeout=30
    )


def test_the_nodes_are_one_cluster_whose_head_offers_no_cpu(house):
    script = "import ray, sys; ray.init(address='auto', logging_level='ERROR'); sys.stdout.write(str([n['Resources'].get('CPU', 0) for n in ray.nodes()]))"
    reached = house.run(
        "ray-worker", "env", f"RAY_ADDRESS=127.0.0.1:{house.ports['6379']}", sys.executable, "-c", script
    )
    assert sorted(json.loads(reached)) == [0, 2]


def test_ray_refuses_who_has_no_token(house):
    assert house.get("8265", "/api/version")[0] == 401
    status, said = house.get("8265", "/api/version", f"Bearer {SECRETS['RAY_AUTH_TOKEN']}")
    assert status == 200 and said["ray_version"] == pinned("ray")


def test_a_job_that_a_flow_submits_reaches_the_store_with_the_keys_of_its_node(house):
    write = "import s3fs; s3fs.S3FileSystem().pipe('darkroom/note', b'written by a job')"
    house.run(
        "prefect-worker",
        "ray",
        "job",
        "submit",
        f"--address=http://127.0.0.1:{house.ports['8265']}",
        "--",
        sys.executable,
        "-c",
        write,
    )
    read = "import s3fs, sys; sys.stdout.write(s3fs.S3FileSystem().cat('darkroom/note').decode())"
    assert house.run("prefect-worker", sys.executable, "-c", read) == "written by a job"


def test_prefect_refuses_who_has_no_password_and_its_worker_is_at_work(house):
    assert house.get("4200", "/api/work_pools/darkroom")[0] == 401
    password = b64encode(f"darkroom:{SECRETS['PREFECT_PASSWORD']}".encode()).decode()
    status, pool = house.get("4200", "/api/work_pools/darkroom", f"Basic {password}")
    assert (status, pool["type"], pool["status"]) == (200, "process", "READY")


def test_prefect_keeps_its_runs_in_the_database(house):
    (program,) = sorted(Path("/usr/lib/postgresql").glob("*/bin/psql"))[-1:]
    query = ["--tuples-only", "--command=select name from work_pool"]
    where = ["--host=127.0.0.1", f"--port={house.ports['5432']}", "--username=prefect", "prefect"]
    found = house.run(
        "prefect-server", "env", f"PGPASSWORD={SECRETS['POSTGRES_PASSWORD']}", str(program), *query, *where
    )
    assert found.split() == ["darkroom"]


def test_the_heads_and_workers_metrics_are_where_prometheus_looks(house):
    for service in ("ray-head", "ray-worker"):
        url = f"http://127.0.0.1:{house.ports[f'{service} 8080']}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        assert "ray_node_disk_free" in text
