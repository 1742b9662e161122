"""What every training worker runs: the plain loop, with callbacks that know Ray Train."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data import storage
from data.ahead import prefetch
from data.config import result_fields
from data.loader import ColumnSet, batches, held_out_batches, key_at
from data.manifest import Snapshot
from stages import logs, publishing, telemetry
from stages.trainables import CONFIGS, FIT
from training import beginning, distributed, loop
from training.checkpoint import TrainState
from training.pretrained import local_folder
from training.sinks import Sinks
from training.systems.system import Batch, Trainable, TrainConfig


def work(spec: dict[str, Any]) -> None:
    """Trains what `spec` says to its end, as one of the ranks; rank 0 publishes. Resumes from the newest checkpoint.

    Publishes nothing where the board says that it shall stop: a checkpoint holds what it has then.
    """
    logs.set_up_worker()
    _meet()
    with logs.at(**spec["place"]), distributed.process_group():
        _train(spec)


def _meet() -> None:
    """Tells this process its rank, and where rank 0 is, in the words of `torchrun`."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    mine = ray.train.get_context()
    here = (ray.util.get_node_ip_address(), _free_port()) if mine.get_world_rank() == 0 else None
    address, port = broadcast_from_rank_zero(here)
    os.environ |= {
        "RANK": str(mine.get_world_rank()),
        "WORLD_SIZE": str(mine.get_world_size()),
        "LOCAL_RANK": str(mine.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(mine.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("", 0))
        return bound.getsockname()[1]


def _train(spec: dict[str, Any]) -> None:
    config = CONFIGS[spec["name"]].model_validate(spec["config"])
    everything = ColumnSet(
        [Snapshot.model_validate(s).model_copy(update={"folder": f}) for s, f in spec["inputs"]]
    )
    columns, held = everything.split(config.held_out(len(everything)))
    trainable: Trainable = FIT[spec["name"]](config, columns)
    kept = _sinks(spec, config) if distributed.rank() == 0 else None
    state = loop.train(
        trainable,
        lambda step: _batches(trainable, columns, config, step),
        config,
        storage.join(spec["folder"], "checkpoints"),
        identity=spec["identity"],
        report=_report(spec, config, kept) if kept else lambda _: None,
        keep=kept.flush if kept else lambda: None,
        key_of=lambda position: key_at(columns, config.seed, position),
        held_out=_held_out(trainable, held, config),
        preempted=_notices(),
        begin=_beginning(spec),
        stopped=_stops(spec["board"]),
    )
    if kept:
        kept.close()
    if state.clock < config.max_steps:
        return
    with publishing.publishing(spec["folder"]) as folder:
        facts = loop.publish(trainable, state, folder)
        if distributed.rank() == 0:
            _write_curve(folder, state)
            publishing.publish(folder, spec["folder"], _facts(state, config, facts))
    distributed.barrier()


def _batches(trainable: Trainable, columns: ColumnSet, config: TrainConfig, step: int) -> Iterator[Batch]:
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


def _beginning(spec: dict[str, Any]) -> Callable[[torch.nn.Module], None]:
    """What gives fresh weights the values that `spec` names; nothing where it names none."""
    if spec["start"] is None:
        return lambda _: None
    folder = (local_folder(spec["start"]) or Path(spec["start"])) / beginning.FOLDERS[spec["name"]]
    return lambda model: beginning.begin_with(model, folder)


def _held_out(
    trainable: Trainable, held: ColumnSet, config: TrainConfig
) -> Callable[[], Iterator[Batch]] | None:
    if not len(held):
        return None
    return lambda: held_out_batches(
        held,
        trainable.columns,
        batch_size=config.batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=distributed.device(),
    )


def _sinks(spec: dict[str, Any], config: TrainConfig) -> Sinks:
    return Sinks(
        storage.join(spec["folder"], "_meta"), config.log_to, run=spec["run"], config=result_fields(config)
    )


def _report(spec: dict[str, Any], config: TrainConfig, kept: Sinks) -> Callable[[loop.Row], None]:
    """What takes each row of the training; of one that is told again after a rollback, its steps are counted already."""
    newest = 0
    board = spec["board"]
    place = {"devices": distributed.world_size(), "device": _device_name()}

    def report(row: loop.Row) -> None:
        nonlocal newest
        if row["step"] > newest:
            telemetry.tell_row(row, config.batch_size)
        newest = row["step"]
        board.write.remote(row["step"], row["loss"], row["samples_per_second"])
        kept.write({**row, **place})

    return report


def _notices() -> Callable[[], bool]:
    """Whether a node of this training was announced to go since the last call; alike on every rank, which all call it."""
    import ray.train

    answered: set[str] = set()

    def preempted() -> bool:
        info = ray.train.get_preemption_info()
        news = set(info.preempted_node_ids) - answered if info else set()
        answered.update(news)
        return bool(news)

    return preempted


def _stops(board: Any) -> Callable[[], bool]:
    """Whether the board says that the training shall stop; rank 0 asks for all."""
    import ray

    return lambda: distributed.rank() == 0 and ray.get(board.is_stopping.remote())


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU {model or platform.machine()}, {torch.get_num_threads()} threads"


def _write_curve(folder: Path, state: TrainState) -> None:
    """The curve, which has no times since its digest is part of what comes after."""
    pq.write_table(pa.Table.from_pylist(state.curve or []), folder / "curve.parquet")


def _facts(state: TrainState, config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What the snapshot says."""
    last = state.curve[-1]["loss"] if state.curve else None
    return {**facts, "max_steps": config.max_steps, "final_loss": last}
