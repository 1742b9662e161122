"""A real Ray cluster on loopback for tests: a head with its job server, a token, and nodes that can be lost."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def below(ancestor: int) -> list[int]:
    """The children of the process `ancestor` and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, level = [], [ancestor]
    while level := [pid for pid, parent in parents.items() if parent in level]:
        found += level
    return found


class RayCluster:
    """What `ray start` makes: its job server listens at `http`. The same ports serve a head after a lost one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(16)
        self.port, self.dashboard = free_port(), free_port()
        self.http = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def client(self) -> dict[str, str]:
        """What a client's environment holds."""
        return {"RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}

    def start_head(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """A head that answers; it misses a dead node within ten seconds."""
        ports = [
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            f"--ray-client-server-port={free_port()}",
        ]
        head = self._start("--head", "--dashboard-host=127.0.0.1", *ports, num_cpus=num_cpus)
        self._wait_for("/api/version", head)
        return head

    def add_node(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """Another node, on this machine too."""
        return self._start(
            f"--address={socket.gethostbyname(socket.gethostname())}:{self.port}", num_cpus=num_cpus
        )

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL of every process of a node."""
        pids = [node.pid, *below(node.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def _start(self, *options: str, num_cpus: int) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        line += [
            f"--num-cpus={num_cpus}",
            f"--dashboard-agent-listen-port={free_port()}",
            "--min-worker-port=0",
        ]
        line += ["--max-worker-port=0", "--object-store-memory=100000000", "--disable-usage-stats"]
        quick = {
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "20",
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an environment that is activated
        mine = {
            "PATH": path,
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
        }
        with (self.folder / f"node-{len(self.nodes)}.log").open("ab") as said:
            node = subprocess.Popen(
                line,
                env=os.environ | self.client | quick | mine,
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def _wait_for(self, path: str, node: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 120
        ask = urllib.request.Request(self.http + path, headers={"Authorization": f"Bearer {self.token}"})
        while True:
            with suppress(OSError), urllib.request.urlopen(ask, timeout=5) as answer:
                assert answer.status == 200
                return
            assert node.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.2)

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("node-*.log"))


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster without nodes yet; whatever was started is ended."""
    folder = Path(
        tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    )  # sockets lie below it: their paths have to be short
    made = RayCluster(folder)
    try:
        yield made
    finally:
        for node in reversed([*made.nodes]):
            made.lose(node)
        shutil.rmtree(folder, ignore_errors=True)
