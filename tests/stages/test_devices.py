"""Who holds a GPU: fake ones of a real cluster, since Ray hands out what it was told that there is."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import add_pictures

from data.errors import UserError
from data.shards import ShardConfig
from data.sources import SourceConfig, source_digest
from stages import catalogue, cluster, fanout
from stages.contract import FanoutConfig, Workspace
from stages.shard import ShardStageConfig

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        head = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        with cluster.cluster(nodes.address):
            yield
        nodes.shutdown()


def seen_by(config: FanoutConfig) -> str | None:
    """The GPUs that an actor of `config` sees."""
    actor = fanout._actor(config)
    try:
        return ray.get(actor.__ray_call__.remote(lambda _: os.environ.get("CUDA_VISIBLE_DEVICES")))
    finally:
        ray.kill(actor)


def test_networks_run_on_the_gpus_of_a_cluster_that_has_some_and_one_actor_has_one():
    settled = catalogue.with_gpus(FanoutConfig())
    assert settled.num_gpus == 1.0 and fanout._room(settled) == 2
    assert seen_by(settled) in ("0", "1")


def test_what_a_user_says_of_gpus_stands():
    assert catalogue.with_gpus(FanoutConfig(num_gpus=0.0)).num_gpus == 0.0
    assert fanout._room(catalogue.with_gpus(FanoutConfig(num_gpus=0.5))) == 4
    with pytest.raises(UserError, match="hold 1 such workers"):
        fanout._room(FanoutConfig(num_gpus=2.0, num_workers=2))


def test_an_actor_without_a_gpu_sees_none():
    workspace = Workspace("memory://nowhere", "0123456789ab", catalogue.with_gpus(FanoutConfig()))
    assert seen_by(workspace.without_gpus.fanout) == ""


def test_a_stage_that_cuts_shards_leaves_every_gpu_to_others_while_it_works(tmp_path):
    source = SourceConfig(path=str(add_pictures(tmp_path / "pictures", range(20))))
    config = ShardStageConfig(
        source=source,
        source_digest=source_digest(source),
        shard=ShardConfig(image_size=32, samples_per_shard=5),
    )
    workspace = Workspace(str(tmp_path / "shard"), "0123456789ab", catalogue.with_gpus(FanoutConfig()))
    with watched() as free:
        made = catalogue.STAGES["shard"].run(config, {}, workspace)
    assert made.samples == 20
    assert min(each.get("CPU", 0) for each in free) < 4, "its actors were seen at work"
    assert {each.get("GPU", 0.0) for each in free} == {2.0}


@contextmanager
def watched() -> Iterator[list[dict[str, float]]]:
    """What nobody holds, looked at again and again within the block."""
    seen, ended = [], threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            seen.append(ray.available_resources())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        ended.set()
        looking.join()
