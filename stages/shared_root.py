"""Whether every node of a cluster sees the local folder that a run writes to: one that does not would write elsewhere."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from data import storage
from data.errors import UserError

LOOK_SECONDS = 60.0
"""How long nodes may take to look. One that does not answer is not refused: what runs there later has deadlines of its own."""


def check_shared(folder: str) -> None:
    """Raises UserError naming a node of the connected cluster that does not see what is written to `folder`, if that is local.

    Nodes that join later are not asked.
    """
    import ray

    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"]}
    if len(names) < 2 or not storage.is_local(folder):
        return
    sign = storage.local_path(folder) / f".tmp-{secrets.token_hex(8)}"
    sign.parent.mkdir(parents=True, exist_ok=True)
    sign.touch()
    try:
        refuse_blind(folder, names, _looked(list(names), str(sign)))
    finally:
        sign.unlink(missing_ok=True)


def refuse_blind(folder: str, names: Mapping[str, str], seen: Mapping[str, bool]) -> None:
    """Raises UserError naming the first node, by its id in `seen`, that looked and saw nothing."""
    for node, sees in seen.items():
        if not sees:
            raise UserError(
                f"node {names[node]} of the cluster does not see {folder}: give a --root that every machine of the cluster "
                "shares, or s3://…"
            )


def _looked(nodes: list[str], path: str) -> dict[str, bool]:
    """Node -> whether it sees `path`, of those that answer."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_sees)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path): node
        for node in nodes
    }
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_SECONDS)
    for each in late:
        ray.cancel(each, force=True)
    seen = {}
    for each in answered:
        with suppress(RayError):  # the node has gone meanwhile
            seen[asked[each]] = ray.get(each)
    return seen


def _sees(path: str) -> bool:
    """Looks for ten seconds: a network file system may remember for a while that a folder was not there."""
    for _ in range(20):
        if Path(path).is_file():
            return True
        time.sleep(0.5)
    return False
