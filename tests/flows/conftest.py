"""A store as a finished run leaves it, made of manifests alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data.config import result_fields
from data.manifest import Parent, Snapshot, publish_snapshot
from flows.assignments import edited
from flows.graph import unclip_nodes
from flows.plan import Plan, PlannedStage, make_plan
from flows.recipes import demo

Planner = Callable[..., Plan]


@pytest.fixture
def plan_of(tmp_path: Path) -> Planner:
    """(*assignments) -> the plan of the demo with them, over the store under `tmp_path`."""

    def plan(*assignments: str) -> Plan:
        recipe = edited(demo(), assignments)
        return make_plan(recipe, unclip_nodes(recipe), str(tmp_path))

    return plan


@pytest.fixture
def publish() -> Callable[[Sequence[PlannedStage]], dict[str, Snapshot]]:
    """Commits a snapshot for each planned stage, parents included; returns them by stage."""

    def commit(stages: Sequence[PlannedStage]) -> dict[str, Snapshot]:
        made: dict[str, Snapshot] = {}
        for stage in stages:
            parents = {
                role: Parent(
                    stage=ref.stage,
                    folder=ref.folder,
                    fingerprint=ref.fingerprint,
                    digest=made[ref.stage].digest,
                )
                for role, ref in stage.inputs.items()
                if ref.stage in made
            }
            snapshot = Snapshot(
                stage=stage.name,
                version=stage.node.stage.version,
                fingerprint=stage.fingerprint,
                config=result_fields(stage.node.config),
                parents=parents,
                created="2026-01-01T00:00:00+00:00",
                seconds=100.0,
                device_seconds={"cpu": 180.0},
            )
            made[stage.name] = publish_snapshot(stage.folder, snapshot)
        return made

    return commit
