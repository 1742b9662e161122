import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from data.errors import UserError
from stages import cluster

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
