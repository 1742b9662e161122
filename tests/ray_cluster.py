"""A real Ray cluster on loopback for tests: a head with its job server, a token, and nodes that can be lost."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
"""From the kernel's <sys/prctl.h>."""
HEAD_ID, HEAD_TYPE = 51 * "f" + "00000", "ray.head.default"
"""What Ray's provider of nodes for tests calls the head and its kind."""


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


def title(pid: int) -> str:
    """The command line of a process, with spaces; empty once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


class RayCluster:
    """What `ray start` makes: its job server listens at `http`. The same ports serve a head after a lost one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(16)
        self.port, self.dashboard = free_port(), free_port()
        self.http = f"http://127.0.0.1:{self.dashboard}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.variables: dict[str, str] = {}

    @property
    def client(self) -> dict[str, str]:
        """What a client's environment holds."""
        return {"RAY_AUTH_TOKEN": self.token, "RAY_AUTH_MODE": "token"}

    def start_head(self, *, num_cpus: int, startable: int = 0) -> subprocess.Popen[bytes]:
        """A head that answers; it misses a dead node within twenty seconds. Its autoscaler may start `startable` nodes of one
        CPU."""
        options = [f"--port={self.port}", f"--dashboard-port={self.dashboard}"]
        options += [f"--ray-client-server-port={free_port()}"]
        options += [f"--autoscaling-config={self._autoscaling(startable)}"] if startable else []
        head = self._start("--head", "--dashboard-host=127.0.0.1", *options, num_cpus=num_cpus)
        deadline = time.monotonic() + 120
        while True:
            with suppress(OSError), urllib.request.urlopen(self._asking("/api/version"), timeout=5):
                return head
            assert head.poll() is None and time.monotonic() < deadline, self._said()
            time.sleep(0.2)

    def add_node(self, *, num_cpus: int) -> subprocess.Popen[bytes]:
        """Another node, on this machine too."""
        return self._start(f"--address={self._gcs}", num_cpus=num_cpus)

    def nodes_below(self, head: subprocess.Popen[bytes]) -> int:
        """How many nodes a head with an autoscaler runs on, itself included."""
        return sum("/raylet/raylet " in title(pid) for pid in below(head.pid))

    @property
    def _gcs(self) -> str:
        return f"{socket.gethostbyname(socket.gethostname())}:{self.port}"

    def _autoscaling(self, nodes: int) -> Path:
        """What `ray up` would give the head, with Ray's own provider of nodes that are processes of this machine."""
        head, worker = ({"node_config": {}, "max_workers": most} for most in (0, nodes))
        empty = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
        empty += ["head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter"]
        config = {
            "cluster_name": "tests",
            "max_workers": nodes,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self._gcs,
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                HEAD_TYPE: head | {"resources": {"CPU": 0}},
                "worker": worker | {"resources": {"CPU": 1, "object_store_memory": 100_000_000}},
            },
            "head_node_type": HEAD_TYPE,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 2.0,
            **{name: [] for name in (*empty, "cluster_synced_files")},
            **{name: {} for name in ("auth", "docker", "file_mounts")},
        }
        path = self.folder / "autoscaling.yaml"
        path.write_text(json.dumps(config))
        self.variables |= {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "DARKROOM_AUTOSCALER": json.dumps([{"nodes": nodes, "cpus": 1}]),
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_enable_autoscaler_v2": "1",
        }
        return path

    def lose(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL of every process of a node."""
        pids = [node.pid, *below(node.pid)]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        self.nodes.remove(node)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Submission id -> what the cluster says of the job."""
        with urllib.request.urlopen(self._asking("/api/jobs/"), timeout=30) as answer:
            return {job["submission_id"]: job for job in json.load(answer) if job["submission_id"]}

    def actors(self) -> set[str]:
        """The classes of all actors that the cluster has had."""
        with urllib.request.urlopen(self._asking("/api/v0/actors?limit=1000"), timeout=30) as answer:
            return {actor["class_name"] for actor in json.load(answer)["data"]["result"]["result"]}

    def jobs_of(self, folder: str) -> list[str]:
        """The ids of the jobs that make the artifact in `folder`, oldest first."""
        mine = [job for job in self.jobs().values() if job["metadata"].get("makes", "").startswith(folder)]
        return [job["submission_id"] for job in sorted(mine, key=lambda job: job["start_time"])]

    def stop(self, job: str) -> None:
        """What `ray job stop` asks for."""
        with urllib.request.urlopen(self._asking(f"/api/jobs/{job}/stop", "POST"), timeout=30) as answer:
            assert json.load(answer) == {"stopped": True}

    def _asking(self, path: str, method: str = "GET") -> urllib.request.Request:
        headers = {"Authorization": f"Bearer {self.token}"}
        return urllib.request.Request(self.http + path, headers=headers, method=method)

    def _start(self, *options: str, num_cpus: int) -> subprocess.Popen[bytes]:
        """A node that runs. Ray gives up one that takes 30 s to come up, as on a busy machine: then another attempt."""
        for _ in range(3):
            node = self._launched(*options, num_cpus=num_cpus)
            self.nodes.append(node)
            deadline = time.monotonic() + 120
            while node.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in (said := self._said()):
                    return node
                time.sleep(0.2)
            self.lose(node)
        raise AssertionError(said)

    def _launched(self, *options: str, num_cpus: int) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options]
        line += [f"--num-cpus={num_cpus}", f"--dashboard-agent-listen-port={free_port()}"]
        line += ["--min-worker-port=0", "--max-worker-port=0"]  # any that are free
        line += ["--object-store-memory=100000000", "--disable-usage-stats"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as where it is activated
        mine = {
            "PATH": path,
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "40",
        }
        with (self.folder / "starting.log").open("wb") as said:
            return subprocess.Popen(
                line,
                env=os.environ | self.client | mine | self.variables,
                cwd=self.folder,
                stdout=said,
                stderr=said,
                start_new_session=True,
                preexec_fn=_end_with_the_tests,
            )

    def _said(self) -> str:
        """What the node that was started last has said."""
        return (self.folder / "starting.log").read_text(errors="replace")


def _end_with_the_tests() -> None:
    """Tells the kernel to end this process, and with it its node, when the tests are killed themselves."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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
