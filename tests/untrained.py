"""A whole run of untrained networks, made stage by stage in this process: no Ray, no Prefect, no training step.

Its store is what `darkroom run demo` with `SETTINGS` would leave, so that every command works on it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_lines import SMALL_NETWORKS

from data import storage
from data.loader import ColumnSet
from data.manifest import START, Snapshot
from flows import runs
from flows.assignments import edited
from flows.comparing import baselines_of
from flows.graph import unclip_nodes
from flows.plan import Plan, PlannedStage, make_plan
from flows.recipes import demo
from stages import embed, encode, evaluate, generate, publishing, shard, train, trainables
from stages.catalogue import STAGES
from stages.contract import Workspace, commit
from stages.fanout import ShardTask
from training.metrics.moments import accumulate_here

SETTINGS = {
    "source.count": 60,
    "shard.samples_per_shard": 30,
    **SMALL_NETWORKS,
    "evaluate.num_images": 26,
    "evaluate.num_inference_steps": 2,
    "evaluate.prior_steps": 2,
    "evaluate.reconstruction_images": 20,
}
TRAININGS = ("clip", "vae", "prior", "denoiser")
DEPLOYED = (
    {
        path: [int(n) for n in value.split(",")] if isinstance(value, str) else value
        for path, value in SETTINGS.items()
        if path != "source.count"
    }
    | {
        f"{training}.{name}": value
        for training in TRAININGS
        for name, value in (("max_steps", 2), ("batch_size", 8), ("num_workers", 1))
    }
    | {"fanout.num_workers": 1}
)
"""Of a deployed flow on pictures of its own: two steps of each training, and what a form holds in place of text."""
MAPPED = (shard, embed, encode, generate, evaluate)


def inline(
    work: Any, arguments: Mapping[str, Any], tasks: Sequence[ShardTask], workspace: Workspace
) -> tuple[Any, ...]:
    """`map_shards` in one process: one worker, every task in order."""
    made = work(**arguments)
    return tuple(written(made(task, workspace.folder)) for task in tasks)


def written(outcome: Any) -> Any:
    """The record of a shard whose work may have left its writing to do."""
    return outcome() if callable(outcome) else outcome


def plan_of(root: Path | str, **changes: Any) -> Plan:
    """The plan of the demo with `SETTINGS` and `changes` (dots written as two underscores)."""
    settings = SETTINGS | {path.replace("__", "."): value for path, value in changes.items()}
    recipe = edited(demo(), [f"{path}={value}" for path, value in settings.items()])
    return make_plan(recipe, unclip_nodes(recipe, baselines=baselines_of(recipe, str(root))), str(root))


def make(plan: Plan, stage: PlannedStage) -> Snapshot:
    """Runs one stage here; a training stage publishes its networks as they are initialised."""
    spec = runs.spec_of(plan, stage)
    if storage.is_local(stage.folder):
        Path(stage.folder).mkdir(parents=True, exist_ok=True)
    inputs = {role: ref.open() for role, ref in spec.inputs.items()}
    config = STAGES[stage.name].config.model_validate(spec.config)
    workspace = Workspace(stage.folder, stage.fingerprint)
    if stage.name in trainables.FIT:
        return _untrained(stage.name, config, inputs, workspace)
    with pytest.MonkeyPatch.context() as patch:
        for module in MAPPED:
            patch.setattr(module, "map_shards", inline)
        patch.setattr(evaluate, "accumulate_on_cluster", accumulate_here)
        return STAGES[stage.name].run(config, inputs, workspace)


def finish(plan: Plan) -> dict[str, Any]:
    """Makes what is pending, keeps the run's record, and returns it."""
    for stage in plan.pending:
        make(plan, stage)
    again = make_plan(plan.recipe, [stage.node for stage in plan.stages], plan.root)
    assert not again.pending
    return runs.carry_out(again, names=[s.name for s in again.stages], address="local", verbose=False)


def _untrained(name: str, config: Any, inputs: Mapping[str, Snapshot], workspace: Workspace) -> Snapshot:
    torch.manual_seed(0)
    trainable = trainables.FIT[name](config, ColumnSet([s for role, s in inputs.items() if role != START]))
    with publishing.publishing(workspace.folder) as folder:
        facts = trainable.publish(trainable.build().eval(), folder)
        pq.write_table(pa.table({"step": [1], "loss": [1.0]}), folder / "curve.parquet")
        publishing.publish(folder, workspace.folder, facts)
    facts, files = publishing.noted(workspace.folder)
    return commit(
        train.STAGES[name], config, inputs, workspace, started=time.monotonic(), files=files, facts=facts
    )
