"""Whole commands on a real cluster: attached to the one of this machine, refused where there is none, and on nodes that come
as they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, TINY, command, environment, result
from ray_cluster import free_port, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHARDS_ALONE = ["run", "demo", "--until=shard", "--json"]
SMALL = {"source.count": 60, "shard.samples_per_shard": 10}


def test_auto_is_the_cluster_of_this_machine_to_which_nothing_is_submitted(darkroom, tmp_path, monkeypatch):
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=1)
        monkeypatch.setenv("RAY_TMPDIR", str(cluster.folder))
        monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)
        made = darkroom(*SHARDS_ALONE, "--address=auto", root=tmp_path, settings=SMALL)
        assert [stage["status"] for stage in result(made)["stages"]] == ["ran"]
        assert len(list(tmp_path.glob("store/shard/*/0*.tar"))) == 6
        assert cluster.jobs() == {} and cluster.actors() == {"_Worker"}, "its actors are the cluster's"


@pytest.mark.parametrize("note", [None, "127.0.0.1:{port}"], ids=["none ever", "one that is gone"])
def test_auto_without_a_cluster_is_one_sentence_and_starts_none(darkroom, tmp_path, monkeypatch, note):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if note:  # as `ray start` leaves it behind
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(note.format(port=free_port()))
    refused = darkroom(*SHARDS_ALONE, "--address=auto", root=tmp_path / "runs", settings=SMALL)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.splitlines()[-1] == (
        "darkroom: --address auto: no Ray cluster answers there; start one with `ray start --head`, or use --address local"
    )
    assert not list(tmp_path.glob("runs/store/*/*/*.tar")) and not list(tmp_path.glob("ray/session*"))


@pytest.mark.faults
def test_a_cluster_without_a_worker_starts_nodes_for_shards_and_for_a_training(tmp_path, prefect_api):
    with ray_cluster() as cluster:
        head = cluster.start_head(num_cpus=0, startable=2)
        assert cluster.nodes_below(head) == 1
        settings = {k: v for k, v in TINY.items() if k != "fanout.num_workers"} | {"clip.num_workers": 2}
        line = command(
            "run",
            "demo",
            "--until=clip",
            "--json",
            f"--address={cluster.http}",
            root=tmp_path,
            settings=settings,
        )
        run = subprocess.run(
            line,
            env=environment() | cluster.client | {"PREFECT_API_URL": prefect_api},
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert [stage["status"] for stage in result(run)["stages"]] == ["ran", "ran"]
        assert cluster.nodes_below(head) == 3
