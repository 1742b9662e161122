"""Every stage by name, and how a spec becomes a snapshot."""

from __future__ import annotations

from data.errors import UserError
from data.lease import lease
from data.manifest import Snapshot, load_snapshot
from stages import cluster, embed, encode, evaluate, generate, report, shard, train
from stages.contract import Progress, Stage, StageSpec, Workspace, silent

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        shard.STAGE,
        *train.STAGES.values(),
        embed.STAGE,
        encode.STAGE,
        generate.STAGE,
        evaluate.STAGE,
        report.STAGE,
    )
}


def check_spec(spec: StageSpec) -> None:
    """Raises UserError when the connected cluster can never run `spec`."""
    stage, gpus = STAGES[spec.stage], cluster.num_gpus()
    if spec.fanout.num_gpus > gpus:
        advice = f"use at most {gpus}" if gpus else "set it to 0 to work on CPUs"
        raise UserError(
            f"fanout.num_gpus={spec.fanout.num_gpus:g}, but the cluster has {gpus} GPUs: {advice}"
        )
    stage.check(stage.config.model_validate(spec.config))


def run_spec(spec: StageSpec, progress: Progress = silent) -> Snapshot:
    """The snapshot that `spec` names: made now on the connected cluster, or found when someone else has made it.

    Holds the artifact's lease while it works; waits, and says so through `progress`, while another run holds it.
    """
    stage = STAGES[spec.stage]
    config = stage.config.model_validate(spec.config)
    with lease(
        spec.folder,
        waiting=lambda owner: progress(0, 1, "waiting", f"process {owner.pid} on {owner.host} builds it"),
        patience=spec.fanout.lease_seconds,
    ):
        inputs = {role: ref.open() for role, ref in spec.inputs.items()}
        made = load_snapshot(spec.folder, spec.fingerprint)
        if made is not None and {r: p.digest for r, p in made.parents.items()} == {
            r: s.digest for r, s in inputs.items()
        }:
            return made
        workspace = Workspace(spec.folder, spec.fingerprint, spec.fanout, progress)
        return stage.run(config, inputs, workspace)
