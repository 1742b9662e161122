"""Nodes that a cluster's autoscaler may start. Ray's own tells nobody, so whoever deploys it says it in the nodes' environment."""

from __future__ import annotations

import os

from pydantic import Field, TypeAdapter, ValidationError

from data.config import Config
from data.errors import UserError

VARIABLE = "DARKROOM_AUTOSCALER"


class NodeGroup(Config):
    """Nodes of one kind."""

    nodes: int = Field(ge=1)
    """How many of them there may be."""
    cpus: int = Field(0, ge=0)
    gpus: int = Field(0, ge=0)


_GROUPS = TypeAdapter(tuple[NodeGroup, ...])


def node_groups() -> tuple[NodeGroup, ...]:
    """The groups that DARKROOM_AUTOSCALER names, none where it is not set. Raises UserError where it says something else."""
    if not (told := os.environ.get(VARIABLE)):
        return ()
    try:
        return _GROUPS.validate_json(told)
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join([*map(str, first["loc"]), first["msg"].lower()])
        raise UserError(
            f'{VARIABLE}={told}: {where}; it lists groups of nodes, such as [{{"nodes": 8, "cpus": 12, "gpus": 1}}]'
        ) from error
