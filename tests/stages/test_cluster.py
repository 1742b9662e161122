import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from data.errors import UserError
from stages import autoscaler, cluster

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import CHECKOUT
from ray_cluster import below

BUSY = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.fixture
def starts(monkeypatch) -> list[Exception | None]:
    """What each start of Ray in turn ends with, None being a cluster that is there."""
    ends: list[Exception | None] = []

    def init(**_: Any) -> None:
        if error := ends.pop(0):
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return ends


def test_a_start_that_a_busy_machine_made_too_slow_is_tried_once_more(starts):
    starts += [Exception(BUSY), None]
    cluster._start({})
    assert starts == []


@pytest.mark.parametrize(
    "ends", [[Exception(BUSY), Exception(BUSY), None], [ValueError("a bad option"), None]]
)
def test_any_other_failure_and_a_second_one_are_told(starts, ends):
    starts += ends
    with pytest.raises(type(ends[0])):
        cluster._start({})
    assert starts == [None]


@pytest.mark.slow
def test_a_cluster_that_a_run_has_started_is_its_own_and_one_that_it_is_attached_to_is_not(monkeypatch):
    assert not cluster.is_own()
    with cluster.cluster("local"):
        assert cluster.is_own()
    assert not cluster.is_own()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        with cluster.cluster(nodes.address):
            assert not cluster.is_own()
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_no_process_of_an_own_cluster_outlives_it_even_one_that_hangs(monkeypatch):
    monkeypatch.setattr(cluster, "ENDING_SECONDS", 0.5)
    with cluster.cluster("local"):
        (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
        environment = os.environ | {"RAY_RAYLET_PID": str(raylet.process.pid)}
        hanging = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], env=environment)
    try:
        assert hanging.wait(5) == -signal.SIGKILL
    finally:
        hanging.kill()


LISTENING = """
from stages import autoscaler, cluster

with cluster.cluster("local"):
    import ray

    working = ray.remote(lambda: 1).remote()
    assert ray.get(working) == 1
    print(ray._private.worker._global_node.all_processes["raylet"][0].process.pid, flush=True)
    input()
"""


@pytest.mark.slow
def test_an_own_cluster_is_reached_from_this_machine_alone():
    """Of all that it started, and of the process that started it: nothing asks for a token there."""
    line = [sys.executable, "-c", LISTENING]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    ) as own:
        raylet = int(own.stdout.readline())
        pids = {own.pid, raylet, *below(own.pid), *cluster._workers_of(raylet)}
        found = [address for pid in pids for address in listening(pid)]
        own.communicate("\n")
    assert own.returncode == 0
    assert len(found) > 5 and all(address.is_loopback for address in found), found


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """The addresses at which a process listens by TCP."""
    mine = {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").glob("*") if path.is_symlink()}
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    ]
    places = [
        fields[1].rpartition(":")[0]
        for fields in lines
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine
    ]
    return [_address(bytes.fromhex(place)) for place in places]


def _address(words: bytes) -> IPv4Address | IPv6Address:
    """From the kernel's words, each in this machine's order."""
    octets = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    address = ip_address(octets)
    return getattr(address, "ipv4_mapped", None) or address


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Cluster]:
    """A head with one CPU."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
def test_what_an_autoscaler_may_start_counts_as_there(nodes, monkeypatch):
    with cluster.cluster(nodes.address):
        assert (cluster.num_cpus(), cluster.num_gpus(), cluster.cpus_beside_a_gpu()) == (1, 0, 1)
        monkeypatch.setenv(
            autoscaler.VARIABLE, '[{"nodes": 4, "cpus": 8}, {"nodes": 3, "cpus": 12, "gpus": 2}]'
        )
        assert (cluster.num_cpus(), cluster.num_gpus(), cluster.cpus_beside_a_gpu()) == (68, 6, 6)
        assert [cluster.cpus_of_each(workers) for workers in (1, 3, 4, 7, 8, 68)] == [12, 12, 8, 8, 6, 1]
        nodes.add_node(num_cpus=8, num_gpus=2)
        assert (cluster.num_gpus(), cluster.cpus_beside_a_gpu()) == (6, 4)


@pytest.mark.slow
def test_a_worker_is_given_no_more_cpus_than_a_node_has(nodes):
    nodes.add_node(num_cpus=5)
    with cluster.cluster(nodes.address):
        assert cluster.num_cpus() == 6
        assert [cluster.cpus_of_each(workers) for workers in (1, 2, 3, 6, 7)] == [5, 2, 1, 1, 1]


@pytest.mark.slow
def test_a_cluster_of_the_runs_own_starts_no_nodes(monkeypatch):
    monkeypatch.setenv(autoscaler.VARIABLE, '[{"nodes": 4, "cpus": 800, "gpus": 8}]')
    with cluster.cluster("local"):
        assert (cluster.num_cpus(), cluster.num_gpus()) == (os.cpu_count(), 0)
        assert cluster.cpus_of_each(1) == os.cpu_count()


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("8 nodes", "invalid json"),
        ('[{"nodes": 0, "cpus": 8}]', "0: nodes: input should be greater than or equal to 1"),
        ('[{"nodes": 2, "cores": 8}]', "0: cores: extra inputs are not permitted"),
    ],
)
def test_what_is_no_list_of_nodes_is_one_sentence(told, reason, monkeypatch):
    monkeypatch.setenv(autoscaler.VARIABLE, told)
    with pytest.raises(UserError) as refused:
        autoscaler.node_groups()
    assert str(refused.value).startswith(f"DARKROOM_AUTOSCALER={told}: {reason}")


@pytest.fixture
def web_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_listens_and_is_no_head_is_refused_at_once(web_server):
    began = time.monotonic()
    with pytest.raises(UserError, match="no Ray cluster answers there"):
        cluster._attach(web_server, {})
    assert time.monotonic() - began < cluster.ANSWER_SECONDS


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:port", "http://127.0.0.1:99999", "127.0.0.1:port", "127.0.0.1", "ray://x:1"]
)
def test_an_address_that_is_none_does_not_answer(address):
    assert not cluster.answers(address)


def test_an_interrupt_in_the_midst_of_rays_waiting_stays_one():
    with pytest.raises(KeyboardInterrupt), cluster.interrupts_kept():
        raise SystemError("CoreWorker.wait returned a result with an exception set") from KeyboardInterrupt()
    for cause in (None, ValueError()):
        with pytest.raises(SystemError), cluster.interrupts_kept():
            raise SystemError("of something else") from cause


def test_rays_own_command_is_told_to_take_the_token(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a" * 32)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    cluster.prepare_environment("http://127.0.0.1:8265")
    assert cluster.ray_command() == "RAY_AUTH_MODE=token ray"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster.ray_command() == "ray"
