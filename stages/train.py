"""Training stages: one trainable on Ray Train, checkpointed by our own loop. The only file that knows Ray Train."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from data import storage
from data.errors import StageFailed, UserError
from data.loader import ColumnSet
from data.manifest import START, Snapshot, load_snapshot
from stages import autoscaler, cluster, logs, model_card, publishing, restarts, spending
from stages.board import Board
from stages.continuation import adopt, donor, keep_for_others, trajectory
from stages.contract import Inputs, Stage, Workspace, commit, stopping_seconds
from stages.trainables import CONFIGS
from training import checkpoint_facts, sinks
from training.checkpoint_places import place_of
from training.systems.system import TrainConfig

log = logging.getLogger("darkroom.train")

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
        check=lambda config: refuse_impossible(name, config),
    )


def run(name: str, config: TrainConfig, inputs: Inputs, workspace: Workspace) -> Snapshot:
    """Trains `name` on the cluster, resuming from its newest checkpoint, and commits what it published.

    Without a checkpoint of its own it goes on from that of a shorter training of the same kind, where there is one; else from
    the weights of the input `start`, where that is given.
    """
    started = time.monotonic()
    config = config.model_copy(update={"num_workers": _workers(config)})
    refuse_impossible(name, config)
    _refuse_misfit(name, config, inputs)
    checkpoints = storage.join(workspace.folder, "checkpoints")
    identity = trajectory(
        name, STAGES[name].version, config, {role: snapshot.digest for role, snapshot in inputs.items()}
    )
    _settle_checkpoints(checkpoints, config, workspace, identity)
    _fit(name, config, inputs, workspace, identity)
    facts, files = publishing.noted(workspace.folder)
    model_card.write(workspace.folder, name, workspace.fingerprint, config, inputs, facts)
    snapshot = commit(STAGES[name], config, inputs, workspace, started=started, files=files, facts=facts)
    keep_for_others(checkpoints, config)
    return snapshot


def _refuse_misfit(name: str, config: TrainConfig, inputs: Inputs) -> None:
    """Raises before any worker waits in a collective: columns that are missing or misaligned, too few samples."""
    inputs = _read_from(inputs)
    have = {column for snapshot in inputs.values() for column in snapshot.columns}
    if missing := READS[name] - have:
        raise UserError(
            f"{name} reads {', '.join(sorted(missing))}, which none of its inputs has; they have {', '.join(sorted(have))}"
        )
    refuse_too_few(name, config, len(ColumnSet(list(inputs.values()))))


def _read_from(inputs: Inputs) -> Inputs:
    """The inputs that have columns."""
    return {role: snapshot for role, snapshot in inputs.items() if role != START}


def _settle_checkpoints(folder: str, config: TrainConfig, workspace: Workspace, identity: str) -> None:
    """Leaves under `folder` what this training may resume from. Raises UserError for a checkpoint of another one."""
    if load_snapshot(workspace.folder, workspace.fingerprint):
        storage.remove_tree(folder)  # made before, from what its inputs held then
    place = place_of(folder)
    for name in place.names():
        try:
            checkpoint_facts.refuse_another(storage.join(folder, name), place.read(name), identity)
            return
        except OSError:
            continue
        except ValueError as error:
            if "belongs to" in str(error):
                raise UserError(str(error)) from error
    if given := donor(workspace.folder, config, identity):
        log.info("going on from step %d of %s", given.step, given.artifact)
        adopt(given, folder)


def _workers(config: TrainConfig) -> int:
    """What `num_workers` says, or what suits the cluster.

    Two processes of half the CPUs step faster than one process of all of them when networks are small, and many times
    faster where something else wants a CPU: threads wait for each other after every operation, processes once a step.
    """
    if config.num_workers:
        return config.num_workers
    return 2 if not cluster.num_gpus() and cluster.num_cpus() > 1 and config.batch_size % 2 == 0 else 1


def refuse(name: str, config: TrainConfig) -> None:
    """Raises UserError for what no cluster can run."""
    if config.num_workers and config.batch_size % config.num_workers:
        fits = [n for n in range(1, config.num_workers) if config.batch_size % n == 0][-1]
        raise UserError(
            f"{name}.batch_size={config.batch_size} is not a multiple of {name}.num_workers={config.num_workers}: "
            f"change either, for example {name}.num_workers={fits}"
        )
    share = config.batch_size // (config.num_workers or 1)
    if share % config.accumulate:
        raise UserError(
            f"{name}.accumulate={config.accumulate} does not divide a worker's {share} samples "
            f"of {name}.batch_size={config.batch_size}: change either"
        )
    if config.fsdp and config.num_workers == 1:
        raise UserError(
            f"{name}.fsdp shards weights over workers and needs {name}.num_workers of 2 or more; it is 1"
        )
    sinks.require(config.log_to, f"{name}.log_to")


def refuse_too_few(name: str, config: TrainConfig, count: int) -> None:
    """Raises UserError when `count` samples, less those held out, do not fill one batch."""
    samples = count - config.held_out(count)
    if samples < config.batch_size:
        raise UserError(
            f"{name}.batch_size={config.batch_size}, but there are only {samples} samples to train on: use at most {samples}, or more data"
        )


def refuse_impossible(name: str, config: TrainConfig) -> None:
    """Raises UserError for what the connected cluster cannot run."""
    config = config.model_copy(update={"num_workers": _workers(config)})
    refuse(name, config)
    gpus, cpus = cluster.num_gpus(), cluster.num_cpus()
    have = gpus or cpus
    if config.num_workers > have:
        more = "" if cluster.is_own() else f", or name the nodes that may come in {autoscaler.VARIABLE}"
        raise UserError(
            f"{name}.num_workers={config.num_workers}, but the cluster has {gpus} GPUs and {cpus} CPUs: use at most {have}{more}"
        )


def _fit(name: str, config: TrainConfig, inputs: Inputs, workspace: Workspace, identity: str) -> None:
    """Runs Ray Train to its end in a thread; this thread shows progress and enforces the deadline."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from stages import train_worker  # which imports the loop and its checkpoints
    from stages.trainer import ColumnTrainer

    records = storage.join(workspace.folder, "_meta", "ray")
    storage.remove_tree(records)  # Ray refuses to go on from a truncated record of its own
    place = dict(logs.place())
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()  # no worker's node
    trainer = ColumnTrainer(
        train_worker.work,
        alone=cluster.is_own(),
        checkpoints=storage.join(workspace.folder, "checkpoints"),
        place=place,
        train_loop_config={
            "name": name,
            "config": config.model_dump(mode="json"),
            "inputs": [(s.model_dump(), s.folder) for s in _read_from(inputs).values()],
            "start": inputs[START].folder if START in inputs else None,
            "folder": workspace.folder,
            "run": f"{name}-{workspace.fingerprint}",
            "identity": identity,
            "board": board,
            "place": place,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=cluster.num_gpus() > 0,
            resources_per_worker={"CPU": _cpus_of_a_worker(config)},
        ),
        run_config=RunConfig(
            name=f"{name}-{time.time_ns():x}",  # Ray's own record of a run is never resumed from: ours is
            **_ray_storage(records),
            failure_config=FailureConfig(restarts.IN_A_ROW, controller_failure_limit=restarts.IN_A_ROW),
        ),
    )
    _watch(trainer.fit, board, config, workspace)
    storage.remove_tree(records)


def _cpus_of_a_worker(config: TrainConfig) -> int:
    if cluster.num_gpus():
        return min(16, cluster.cpus_beside_a_gpu())
    return min(16, cluster.cpus_of_each(config.num_workers or 1))


def _watch(fit: Callable[[], Any], board: Any, config: TrainConfig, workspace: Workspace) -> None:
    # No join: one that a signal interrupts takes the thread for ended (Python 3.11).
    failure: list[BaseException] = []
    ended = threading.Event()
    arguments = (fit, failure, ended)
    threading.Thread(target=_capture, args=arguments, daemon=True, name="darkroom-fit").start()
    meter = _meter(config, workspace)
    try:
        with cluster.interrupts_kept():
            _follow(ended, board, config, workspace, meter)
    except Exception:
        raise
    except BaseException:  # told to stop: Ctrl-C, SIGTERM, a cancelled flow
        log.warning("saving a checkpoint before the training stops")
        board.stop.remote()
        if not ended.wait(seconds := stopping_seconds()) or failure:
            why = restarts.told(failure[0]) if failure else f"it took more than {seconds:g} s"
            log.warning("it stopped without one (%s): the last checkpoint before it counts", why)
        raise
    finally:
        meter.tell(workers=config.num_workers or 1)
        meter.note()
    if failure:
        raise restarts.told(failure[0]) from failure[0]


def _follow(
    ended: threading.Event, board: Any, config: TrainConfig, workspace: Workspace, meter: spending.Meter
) -> None:
    import ray

    seen, moved = -1, time.monotonic()
    has_ended = False
    while not has_ended:
        has_ended = ended.wait(0.5)
        meter.tell(workers=config.num_workers or 1)
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


def _meter(config: TrainConfig, workspace: Workspace) -> spending.Meter:
    place = (workspace.folder, workspace.fingerprint)
    if cluster.num_gpus():
        return spending.Meter(*place, "gpu")
    return spending.Meter(*place, "cpu", _cpus_of_a_worker(config))


def _capture(fit: Callable[[], Any], failure: list[BaseException], ended: threading.Event) -> None:
    try:
        fit()
    except BaseException as error:
        failure.append(error)
    finally:
        ended.set()


def _ray_storage(url: str) -> dict[str, Any]:
    """How Ray Train is told to keep its own record of a run at `url`."""
    if storage.is_local(url):
        return {"storage_path": str(storage.local_path(url).resolve())}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    filesystem, path = storage.filesystem_of(url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(filesystem))}


STAGES = {name: training_stage(name) for name in CONFIGS}
