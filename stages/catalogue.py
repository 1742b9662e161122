"""Every stage by name, and how a spec becomes a snapshot."""

from __future__ import annotations

from pydantic import ValidationError

from data.errors import UserError
from data.lease import lease
from data.manifest import Snapshot
from stages import cluster, embed, encode, evaluate, generate, logs, report, shard, text, train
from stages.contract import FanoutConfig, Progress, Stage, StageSpec, Workspace, silent

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        shard.STAGE,
        *train.STAGES.values(),
        embed.STAGE,
        text.STAGE,
        encode.STAGE,
        generate.STAGE,
        evaluate.STAGE,
        report.STAGE,
    )
}


def check_spec(spec: StageSpec) -> None:
    """Raises UserError when the connected cluster can never run `spec`, or has another version of its stage."""
    stage, gpus = STAGES.get(spec.stage), cluster.num_gpus()
    if stage is None or spec.version not in (None, stage.version):
        here = f"version {stage.version}" if stage else "none"
        raise UserError(
            f"the plan is for version {spec.version} of stage {spec.stage}, and the Darkroom that runs it has {here}: run "
            "the same Darkroom on both sides (another image, or jobs.working_dir)"
        )
    if (asked := spec.fanout.num_gpus or 0.0) > gpus:
        advice = f"use at most {gpus}" if gpus else "set it to 0 to work on CPUs"
        raise UserError(f"fanout.num_gpus={asked:g}, but the cluster has {gpus} GPUs: {advice}")
    try:
        config = stage.config.model_validate(spec.config)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise UserError(
            f"the plan's {spec.stage} is not what the Darkroom that runs it knows ({what}): run the same Darkroom on both sides"
        ) from error
    stage.check(config)


def run_spec(spec: StageSpec, progress: Progress = silent) -> Snapshot:
    """The snapshot that `spec` names: made now on the connected cluster, or found when someone else has made it.

    Holds the artifact's lease while it works; waits, and says so through `progress`, while another run holds it.
    """
    stage = STAGES[spec.stage]
    config = stage.config.model_validate(spec.config)
    with (
        logs.at(run=spec.run, stage=spec.stage),
        lease(
            spec.folder,
            waiting=lambda owner: progress(0, 1, "waiting", f"process {owner.pid} on {owner.host} builds it"),
            patience=spec.fanout.lease_seconds,
            setting="fanout.lease_seconds",
        ),
    ):
        if snapshot := spec.made():
            return snapshot
        inputs = {role: ref.open() for role, ref in spec.inputs.items()}
        workspace = Workspace(spec.folder, spec.fingerprint, with_gpus(spec.fanout), progress)
        return stage.run(config, inputs, workspace)


def with_gpus(fanout: FanoutConfig) -> FanoutConfig:
    """`fanout` with its actors' GPUs settled: the networks of a cluster that has GPUs run on them unless told otherwise."""
    if fanout.num_gpus is not None:
        return fanout
    return fanout.model_copy(update={"num_gpus": 1.0 if cluster.num_gpus() else 0.0})
