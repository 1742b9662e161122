"""What a node runs before it goes, in an empty folder against a real node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import CHECKOUT
from ray_cluster import ray_cluster

SECONDS = 90


@pytest.mark.slow
def test_a_node_that_leaves_tells_ray_and_the_script_ends_with_it(tmp_path):
    for name in ("leave.sh", "healthy.py"):
        shutil.copy(CHECKOUT / "infra" / "docker" / name, tmp_path)
    with ray_cluster() as cluster:
        node = cluster.start_head(num_cpus=1)
        (agent,) = [part for part in map(str, node.args) if "agent-listen-port" in part]  # pyright: ignore[reportArgumentType]
        mine = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(cluster.folder),
            "RAY_ADDRESS": f"127.0.0.1:{cluster.port}",
            "RAYLET_HEALTH": f"http://127.0.0.1:{agent.rpartition('=')[2]}/api/local_raylet_healthz",
        }
        began = time.monotonic()
        left = subprocess.run(
            ["bash", str(tmp_path / "leave.sh"), str(SECONDS)],
            env=os.environ | cluster.client | mine,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
        )
        assert left.returncode == 0 and time.monotonic() - began < SECONDS, left.stderr
        (said,) = cluster.folder.glob("ray/session_2*/logs/gcs_server.out")
        assert "AUTOSCALER_DRAIN_PREEMPTED, death message = this node goes" in said.read_text()
