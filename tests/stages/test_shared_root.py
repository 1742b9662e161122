"""A root that a node of the cluster does not see is refused before anything is written elsewhere."""

from __future__ import annotations

import pytest
import ray

from data.errors import UserError
from stages.cluster import cluster
from stages.shared_root import check_shared, refuse_blind


@pytest.fixture
def two_nodes(monkeypatch):
    """This process attached to a cluster of two nodes on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        with cluster(nodes.address):
            yield nodes
    finally:
        nodes.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("two_nodes")
def test_a_folder_that_both_nodes_see_is_taken_and_one_that_none_sees_is_not(tmp_path, monkeypatch):
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    folder = tmp_path / "store" / "shard" / "a"
    check_shared(str(folder))
    assert list(folder.iterdir()) == []
    monkeypatch.setattr("stages.shared_root.Path.touch", lambda _: None)  # as if it were written elsewhere
    with pytest.raises(UserError, match=r"^node \S+ of the cluster does not see .*: give a --root"):
        check_shared(str(folder))


def test_the_node_that_does_not_see_it_is_named():
    names = {"1": "head", "2": "worker"}
    refuse_blind("/runs", names, {"1": True, "2": True})
    with pytest.raises(UserError, match="node worker of the cluster does not see /runs"):
        refuse_blind("/runs", names, {"1": True, "2": False})
