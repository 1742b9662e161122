"""Training stages: one trainable on Ray Train, checkpointed by our own loop. The only file that knows Ray Train."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.errors import DarkroomError, StageFailed, UserError
from data.loader import ColumnSet, batches, held_out_batches, key_at, prefetch
from data.manifest import FileRecord, Snapshot, file_record
from stages import cluster
from stages.contract import Inputs, Stage, Workspace, commit
from training import distributed, loop
from training.systems import clip, denoiser, prior, vae
from training.systems.system import TrainConfig

FIT = {"clip": clip.fit, "vae": vae.fit, "prior": prior.fit, "denoiser": denoiser.fit}
"""trainable -> fit(config, columns): what the data tells a trainable before it is built."""

CONFIGS = {
    "clip": clip.ClipConfig,
    "vae": vae.VaeConfig,
    "prior": prior.PriorConfig,
    "denoiser": denoiser.DenoiserConfig,
}

READS = {
    "clip": frozenset({"image", "caption"}),
    "vae": frozenset({"image"}),
    "prior": frozenset({"img_emb", "text_emb", "text_hidden"}),
    "denoiser": frozenset({"img_emb", "text_hidden", "vae_moments"}),
}


def training_stage(name: str) -> Stage:
    """The stage that trains the trainable `name` and publishes its averaged weights."""
    return Stage(
        name=name,
        version=1,
        reads=lambda _: READS[name],
        writes=lambda _: frozenset(),
        config=CONFIGS[name],
        run=lambda config, inputs, workspace: run(name, config, inputs, workspace),
    )


def run(name: str, config: TrainConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Trains `name` on the cluster, resuming from its newest checkpoint, and commits what it published."""
    started = time.monotonic()
    config = config.model_copy(update={"num_workers": _workers(config)})
    _refuse_impossible(name, config)
    ColumnSet(list(inputs.values()))  # a misaligned join stops here, before any worker waits in a collective
    _fit(name, config, inputs, workspace)
    folder = storage.local_path(workspace.folder)
    facts = json.loads((folder / "_meta" / "facts.json").read_text())
    snapshot = commit(
        STAGES[name], config, inputs, workspace, started=started, files=_published(folder), facts=facts
    )
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "_meta" / "ray", ignore_errors=True)
    return snapshot


def _workers(config: TrainConfig) -> int:
    """What `num_workers` says, or what suits the cluster.

    Two processes of half the CPUs step faster than one process of all of them when networks are small, and many times
    faster where something else wants a CPU: threads wait for each other after every operation, processes once a step.
    """
    if config.num_workers:
        return config.num_workers
    return 2 if not cluster.num_gpus() and cluster.num_cpus() > 1 and config.batch_size % 2 == 0 else 1


def _refuse_impossible(name: str, config: TrainConfig) -> None:
    if config.batch_size % config.num_workers:
        raise UserError(
            f"{name}.batch_size={config.batch_size} is not a multiple of {name}.num_workers={config.num_workers}: change either"
        )
    if config.batch_size // config.num_workers % config.accumulate:
        raise UserError(
            f"{name}.accumulate={config.accumulate} does not divide a worker's {config.batch_size // config.num_workers} samples "
            f"of {name}.batch_size={config.batch_size}: change either"
        )
    if config.fsdp and config.num_workers == 1:
        raise UserError(
            f"{name}.fsdp shards weights over workers and needs {name}.num_workers of 2 or more; it is 1"
        )
    gpus, cpus = cluster.num_gpus(), cluster.num_cpus()
    have = gpus or cpus
    if config.num_workers > have:
        raise UserError(
            f"{name}.num_workers={config.num_workers}, but the cluster has {gpus} GPUs and {cpus} CPUs: use at most {have}"
        )


def _fit(name: str, config: TrainConfig, inputs: Inputs, workspace: Workspace) -> None:
    """Runs Ray Train to its end in a thread; this thread shows progress and enforces the deadline."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    board = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "name": name,
            "config": config.model_dump(),
            "inputs": [(s.model_dump(), s.folder) for s in inputs.values()],
            "folder": workspace.folder,
            "identity": workspace.fingerprint,
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=cluster.num_gpus() > 0,
            resources_per_worker={"CPU": max(1, min(16, cluster.num_cpus() // config.num_workers))},
        ),
        run_config=RunConfig(
            name=f"{name}-{time.time_ns():x}",  # Ray's own record of a run is never resumed from: ours is
            storage_path=str(storage.local_path(workspace.folder).resolve() / "_meta" / "ray"),
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
        ),
    )
    _watch(trainer.fit, board, config, workspace)


def _watch(fit: Callable[[], Any], board: Any, config: TrainConfig, workspace: Workspace) -> None:
    import ray

    failure: list[BaseException] = []
    thread = threading.Thread(target=_capture, args=(fit, failure), daemon=True, name="darkroom-fit")
    thread.start()
    seen, moved = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        step, loss, rate = ray.get(board.read.remote())
        if step != seen:
            seen, moved = step, time.monotonic()
            workspace.progress(
                max(step, 0),
                config.max_steps,
                "steps",
                f"loss {loss:.4f}  {rate:.0f} samples/s" if rate else "",
            )
        if time.monotonic() - moved > workspace.fanout.stall_seconds:
            raise StageFailed(
                f"training made no step for {workspace.fanout.stall_seconds:.0f} s (fanout.stall_seconds)"
            )
    if failure:
        raise _root_cause(failure[0]) from failure[0]


def _capture(fit: Callable[[], Any], failure: list[BaseException]) -> None:
    try:
        fit()
    except BaseException as error:
        failure.append(error)


def _root_cause(error: BaseException) -> BaseException:
    """The worker's own error, when it is one that says what to do; else a StageFailed that quotes it."""
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException | None = next(iter(failures.values()), None) or error.__cause__ or error
    inner = getattr(cause, "cause", None) or cause
    if isinstance(inner, DarkroomError | FloatingPointError | OSError):
        return inner
    lines = str(inner).strip().splitlines() or [""]
    return StageFailed(f"training failed: {type(inner).__name__}: {lines[-1]}")


class _Board:
    """An actor that holds the newest progress of rank 0."""

    def __init__(self) -> None:
        self.row = (-1, 0.0, 0.0)

    def write(self, step: int, loss: float, rate: float) -> None:
        self.row = (step, loss, rate)

    def read(self) -> tuple[int, float, float]:
        return self.row


def _worker(spec: dict[str, Any]) -> None:
    """What every training worker runs: nothing here but the plain loop, with a progress callback."""
    name, folder, board = spec["name"], storage.local_path(spec["folder"]), spec["board"]
    config = CONFIGS[name].model_validate(spec["config"])
    everything = ColumnSet(
        [Snapshot.model_validate(s).model_copy(update={"folder": f}) for s, f in spec["inputs"]]
    )
    columns, held = everything.split(_held_out_samples(config, len(everything)))
    trainable = FIT[name](config, columns)

    def from_step(step: int) -> Any:
        return prefetch(
            batches(
                columns,
                trainable.columns,
                seed=config.seed,
                batch_size=config.batch_size,
                first_step=step,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                device=distributed.device(),
            )
        )

    def report(row: loop.Row) -> None:
        if distributed.rank() == 0:
            board.write.remote(row["step"], row["loss"], row["samples_per_second"])

    def held_out() -> Any:
        return held_out_batches(
            held,
            trainable.columns,
            batch_size=config.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            device=distributed.device(),
        )

    state = loop.train(
        trainable,
        from_step,
        config,
        folder / "checkpoints",
        identity=spec["identity"],
        report=report,
        key_of=lambda position: key_at(columns, config.seed, position),
        held_out=held_out if len(held) >= distributed.world_size() else None,
    )
    facts = loop.publish(trainable, state, folder)
    if distributed.rank() == 0:
        pq.write_table(
            pa.Table.from_pylist(state.curve or []), folder / "curve.parquet"
        )  # its digest is part of what comes after
        facts = {
            **facts,
            "max_steps": config.max_steps,
            "final_loss": state.curve[-1]["loss"] if state.curve else None,
        }
        storage.write_bytes(str(folder / "_meta" / "facts.json"), json.dumps(facts).encode())
    distributed.barrier()


def _held_out_samples(config: TrainConfig, count: int) -> int:
    return min(config.validation_samples, count // 10) if config.validate_every else 0


def _published(folder: Path) -> tuple[FileRecord, ...]:
    hidden = {"_meta", "checkpoints"}
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return tuple(file_record(str(folder), p.as_posix()) for p in paths if p.parts[0] not in hidden)


STAGES = {name: training_stage(name) for name in FIT}
