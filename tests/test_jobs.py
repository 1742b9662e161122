"""Stages as jobs of a real cluster: `ray start`, its job server, a token, and clients that come, are killed and come again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import result
from ray_cluster import RayCluster, ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = {"source.count": 60, "shard.samples_per_shard": 10}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head with one CPU."""
    with ray_cluster() as made:
        made.start_head(num_cpus=1)
        yield made


@pytest.fixture(autouse=True)
def _token(cluster, monkeypatch) -> None:
    """The cluster's token, where a user would have it."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.token)


def test_a_stage_is_a_job_and_its_shards_are_those_of_a_run_on_this_machine(cluster, darkroom, tmp_path):
    line = ["run", "demo", "--until=shard", "--json"]
    made = darkroom(*line, f"--address={cluster.http}", root=tmp_path / "job", settings=SMALL)
    assert [stage["status"] for stage in result(made)["stages"]] == ["ran"]
    assert "0/60 samples" in made.stderr and "is job shard-" in made.stderr
    here = darkroom(*line, root=tmp_path / "here", settings=SMALL)
    digests = [
        {path.name: path.read_bytes() for path in root.glob("store/shard/*/0*")}
        for root in (tmp_path / "job", tmp_path / "here")
    ]
    assert result(here) and digests[0] == digests[1] and len(digests[0]) == 18
    again = darkroom(*line, f"--address={cluster.http}", root=tmp_path / "job", settings=SMALL)
    assert [stage["status"] for stage in result(again)["stages"]] == ["cached"]
