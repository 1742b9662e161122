"""infra/ray/cluster.yaml, held against Ray's own schema of it."""

from __future__ import annotations

import copy
import json
import shlex
from typing import Any

import jsonschema
import pytest

from stages import autoscaler
from tests.infra.conftest import INFRA, our_image, read_yaml


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return read_yaml(INFRA / "ray" / "cluster.yaml")


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of `config`, defaults filled in; raises as `ray up` would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_up_takes_it(cluster):
    prepared = validate(cluster)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate({**cluster, "idle_timeout": 5})


def test_the_head_is_on_demand_and_works_nothing_the_workers_are_spot_and_start_at_none(cluster):
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    workers = [kind for name, kind in types.items() if name != cluster["head_node_type"]]
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers)
    assert all(kind["min_workers"] == 0 for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) == cluster["max_workers"]


def test_ray_asks_for_the_token_of_a_file_and_serves_its_dashboard_on_loopback(cluster):
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (path,) = cluster["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={path}" in options
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


CLOUD = {"c7i.4xlarge": {"cpus": 16}, "g6.4xlarge": {"cpus": 16, "gpus": 1}}
"""What Ray finds on an instance, by the cloud's own tables."""


def test_programs_are_told_what_the_autoscaler_may_start(cluster):
    words = shlex.split(" ".join(cluster["docker"]["run_options"]))
    told = next(word for word in words if word.startswith(autoscaler.VARIABLE)).partition("=")[2]
    kinds = [kind for name, kind in cluster["available_node_types"].items() if name != "head"]
    there = [{"nodes": kind["max_workers"], **CLOUD[kind["node_config"]["InstanceType"]]} for kind in kinds]
    assert json.loads(told) == there


def test_its_images_are_ours(cluster):
    docker = cluster["docker"]
    assert (docker["head_image"], docker["image"]) == (our_image("cpu"), our_image("cuda"))
