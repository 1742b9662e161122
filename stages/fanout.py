"""Maps one per-shard function over shards on Ray actors: bounded in flight, attempts counted, a receipt per finished shard.

Killing anything at any time loses at most the shards in flight. A receipt names the digests of what its shard was made
from; one that no longer matches is made anew. The worker count is no part of any result.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from data import manifest
from data.errors import NO_PLACE_TO_WRITE, StageFailed, UserError
from data.manifest import ShardRecord
from stages import cluster, logs, spending, telemetry
from stages.contract import FanoutConfig, Inputs, Workspace, stopping_seconds

log = logging.getLogger("darkroom.shards")

MAX_RESTING = 2
"""Actors kept from one stage to the next: each holds several hundred megabytes of libraries beside a training."""

Writing = Callable[[], ShardRecord]
"""What is left of a shard once it is computed: publishes its files and returns its record."""


class ShardWork(Protocol):
    """What an actor holds: built once per actor (weights are loaded there), called once per task.

    One that returns a `Writing` has its next shard computed while that goes on, in a thread.
    """

    def __call__(self, task: ShardTask, folder: str) -> ShardRecord | Writing: ...


@dataclass(frozen=True)
class ShardTask:
    """One shard to make."""

    index: int
    payload: Any
    """What the work needs to know; small, sent through Ray."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """role -> digest of what the shard is made from; a receipt with other parents is stale."""
    weight: int = 1
    """Samples, for the progress display."""


def map_shards(
    work: Callable[..., ShardWork],
    arguments: Mapping[str, Any],
    tasks: Sequence[ShardTask],
    workspace: Workspace,
) -> tuple[ShardRecord, ...]:
    """The records of all `tasks`, in index order, running only those without a valid receipt.

    `work(**arguments)` is built inside each actor. Raises StageFailed naming the first shard that failed
    `max_attempts` times, after the others have finished; UserError from a worker is raised as it is, at once.
    """
    done = finished(tasks, workspace.folder)
    todo = [task for task in tasks if task.index not in done]
    pool = _Pool(work, arguments, workspace, todo) if todo else None
    total = sum(task.weight for task in tasks)
    finished_weight = total - sum(task.weight for task in todo)
    workspace.progress(finished_weight, total, "samples")
    try:
        while pool and pool.unfinished:
            with cluster.interrupts_kept():
                collected = pool.collect()
            for task, record in collected:
                done[task.index] = record
                finished_weight += task.weight
                pool.tell(task, record)
                workspace.progress(finished_weight, total, "samples")
    except Exception:
        raise
    except BaseException:  # told to stop: Ctrl-C, SIGTERM, a cancelled flow
        if pool:
            pool.finish_begun()
        raise
    finally:
        if pool:
            pool.close()
    if pool and pool.quarantine:
        index, reason = next(iter(sorted(pool.quarantine.items())))
        raise StageFailed(
            f"{len(pool.quarantine)} of {len(tasks)} shards failed; shard {index:05d}: {reason}"
        )
    return tuple(done[task.index] for task in tasks)


def finished(tasks: Sequence[ShardTask], folder: str) -> dict[int, ShardRecord]:
    """index -> receipt, of the tasks whose receipt is there and names the same parents."""
    receipts = {task.index: manifest.load_receipt(folder, task.index) for task in tasks}
    return {t.index: r for t in tasks if (r := receipts[t.index]) and r.parents == dict(t.parents)}


def per_shard(inputs: Inputs, encoder: str) -> list[ShardTask]:
    """A task for each shard of `data` that has samples, made from it and from the network in the role `encoder`."""
    made_by = inputs[encoder].digest
    shards = [shard for shard in inputs["data"].shards if shard.samples]
    return [
        ShardTask(shard.index, shard, {"data": shard.digest, encoder: made_by}, shard.samples)
        for shard in shards
    ]


class _Pool:
    """Actors, their one task each and what they still write of the one before, and the attempts of every shard.

    An actor gets its first task when it answers: one that the cluster has no room for, as after the loss of a node, or
    where more were asked for than there are CPUs, holds no shard back.
    """

    def __init__(
        self, work: Callable, arguments: Mapping, workspace: Workspace, todo: Sequence[ShardTask]
    ) -> None:
        self.workspace, self.config = workspace, workspace.fanout
        self.waiting = list(reversed(todo))
        self.attempts = {task.index: 0 for task in todo}
        self.began: dict[int, float] = {}
        gpus = self.config.num_gpus
        self.meter = spending.Meter(
            workspace.folder, workspace.fingerprint, "gpu" if gpus else "cpu", gpus or 1.0
        )
        self.quarantine: dict[int, str] = {}
        self.running: dict[Any, tuple[ShardTask, Any]] = {}
        self.computed: list[tuple[ShardTask, Any]] = []
        self.writing: dict[Any, tuple[ShardTask, Any]] = {}
        self.starting: dict[Any, Any] = {}
        self.idle: list[Any] = []
        size = min(len(todo), _room(self.config))
        self.work = (work, dict(arguments), dict(logs.place()))
        for _ in range(size):
            self._spawn()
        self.last_finish = time.monotonic()

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running or self.computed or self.writing)

    def collect(self) -> list[tuple[ShardTask, ShardRecord]]:
        """Starts what can start, waits for what ends first, and returns what succeeded."""
        import ray

        while self.waiting and self.idle:
            self._start(self.waiting.pop(), self.idle.pop())
        for (
            task,
            actor,
        ) in self.computed:  # asked for behind the actor's next shard, which need not wait for it
            self.writing[actor.written.remote(task.index)] = (task, actor)
        self.computed.clear()
        at_work = [*self.running, *self.writing, *self.starting]
        ready, _ = ray.wait(at_work, num_returns=1, timeout=2.0)
        self.meter.tell(workers=len(self.idle) + len(self.running))
        telemetry.tell("darkroom_shards_waiting", len(self.waiting))
        settled = [self._settle(reference) for reference in ready if reference not in self.starting]
        for reference in ready:
            if reference in self.starting:
                self._welcome(reference)
        if time.monotonic() - self.last_finish > self.config.stall_seconds:
            raise StageFailed(
                f"no shard finished for {self.config.stall_seconds:.0f} s (fanout.stall_seconds)"
            )
        return [record for record in settled if record is not None]

    def tell(self, task: ShardTask, record: ShardRecord) -> None:
        """Lets logs and figures know that a shard is done."""
        seconds = time.monotonic() - self.began[task.index]
        telemetry.tell_shard(record, task.weight, seconds)
        log.debug("done, %d samples in %.1f s", task.weight, seconds, extra={"shard": task.index})

    def finish_begun(self) -> None:
        """Lets the shards that were begun be finished, for as long as a stop may take; no other begins."""
        give_up = time.monotonic() + stopping_seconds()
        with contextlib.suppress(Exception):  # why one of them fails will be told when it is attempted again
            while (self.running or self.computed or self.writing) and time.monotonic() < give_up:
                self.waiting.clear()
                self.collect()

    def close(self) -> None:
        import ray

        self.meter.note()
        busy = [actor for _, actor in (*self.running.values(), *self.computed, *self.writing.values())]
        kept = [actor for actor in self.idle if actor not in busy][:MAX_RESTING] if _may_rest() else []
        for actor in kept:
            actor.rest.remote()
            cluster.resting().append(actor)
        for actor in {*self.idle, *self.starting.values(), *busy} - {*kept}:
            ray.kill(actor)

    def _spawn(self) -> None:
        resting = cluster.resting()
        actor = resting.pop() if resting else _actor(self.config)
        self.starting[actor.begin.remote(*self.work)] = actor

    def _welcome(self, reference: Any) -> None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError

        actor = self.starting.pop(reference)
        try:
            ray.get(reference)
        except (RayActorError, OutOfMemoryError) as error:
            log.warning("a worker died as it started (%s): starting another", type(error).__name__)
            self._spawn()
        else:
            self.idle.append(actor)

    def _start(self, task: ShardTask, actor: Any) -> None:
        self.attempts[task.index] += 1
        self.began[task.index] = time.monotonic()
        self.running[actor.run.remote(task, self.workspace.folder)] = (task, actor)

    def _settle(self, reference: Any) -> tuple[ShardTask, ShardRecord] | None:
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        was_running = reference in self.running
        task, actor = (self.running if was_running else self.writing).pop(reference)
        self.last_finish = time.monotonic()
        try:
            record = ray.get(reference)
        except RayTaskError as error:
            self.idle += [actor] if was_running else []
            cause = error.cause
            if isinstance(cause, UserError) or getattr(cause, "errno", None) in NO_PLACE_TO_WRITE:
                raise cause from None  # no second attempt mends a wrong config or a full disk
            self._retry(task, cause, f"{type(cause).__name__}: {cause}")
            return None
        except (RayActorError, OutOfMemoryError) as error:
            self._bury(actor, was_running=was_running)
            self._retry(task, error, f"its worker died ({type(error).__name__})")
            return None
        self.idle += [actor] if was_running else []
        if record is None:
            self.computed.append((task, actor))
            return None
        return task, record

    def _bury(self, actor: Any, *, was_running: bool) -> None:
        """Replaces a dead actor, once: its task or its place among the idle goes, and what it wrote is told of apart."""
        if was_running or actor in self.idle:
            self.idle = [other for other in self.idle if other != actor]
            self._spawn()

    def _retry(self, task: ShardTask, cause: BaseException, reason: str) -> None:
        telemetry.tell("darkroom_failed_attempts", 1, reason=type(cause).__name__)
        count = f"attempt {self.attempts[task.index]} of {self.config.max_attempts}"
        log.warning("shard %05d: %s, %s", task.index, reason, count, extra={"shard": task.index})
        if self.attempts[task.index] < self.config.max_attempts:
            self.waiting.append(task)
        else:
            self.quarantine[task.index] = f"{reason}, {self.attempts[task.index]} attempts"


def _room(config: FanoutConfig) -> int:
    """Actors to start: as many as asked for, else as the cluster holds; UserError when they could never all start."""
    room = cluster.num_cpus()
    if config.num_gpus:
        room = min(room, int(cluster.num_gpus() / config.num_gpus))
    wanted = config.num_workers or room
    if room < 1 or (config.num_gpus and wanted > room):
        raise UserError(
            f"fanout.num_workers={config.num_workers or 1} with fanout.num_gpus={config.num_gpus:g}: the cluster's "
            f"{cluster.num_gpus()} GPUs hold {room} such workers; use at most that many"
        )
    # Those that may rest hold no CPU, so that none of too many would wait for one.
    return min(wanted, room) if _may_rest() else wanted


def _may_rest() -> bool:
    """Whether actors outlive a stage: where no other run waits for their CPU, and no network of theirs fills a GPU."""
    return cluster.is_own() and not cluster.num_gpus()


def _actor(config: FanoutConfig) -> Any:
    import ray

    # One that rests holds no CPU, or the training between two stages would wait for it.
    room = {"num_cpus": 0 if _may_rest() else 1, "num_gpus": config.num_gpus}
    # max_task_retries=0: Ray would repeat a poison shard unseen; attempts are counted here and nowhere else.
    return ray.remote(**room, max_restarts=0, max_task_retries=0)(_Worker).remote()


class _Worker:
    """The actor's body: builds its work at its first task, where an error reaches the driver as what it is."""

    def __init__(self) -> None:
        logs.set_up_worker()
        self.writer = ThreadPoolExecutor(1, "write")
        self.writing: dict[int, Future[ShardRecord]] = {}

    def begin(self, work: Callable[..., ShardWork], arguments: dict[str, Any], place: dict[str, Any]) -> None:
        """Takes the work of a stage. That it returns tells that the actor has a place in the cluster."""
        self.place = place
        self.build = functools.cache(functools.partial(work, **arguments))

    def rest(self) -> None:
        """Lets go of what it built."""
        del self.build
        gc.collect()

    def run(self, task: ShardTask, folder: str) -> ShardRecord | None:
        """The record of a finished shard; None while it is still written, which `written` waits for."""
        with logs.at(**self.place, shard=task.index):
            made = self.build()(task, folder)
            if isinstance(made, ShardRecord):
                manifest.publish_receipt(folder, made)
                return made
            context = contextvars.copy_context()
            self.writing[task.index] = self.writer.submit(context.run, _written, made, folder)
        return None

    def written(self, index: int) -> ShardRecord:
        """The record of a shard that `run` computed, once it is written."""
        return self.writing.pop(index).result()


def _written(writing: Writing, folder: str) -> ShardRecord:
    record = writing()
    manifest.publish_receipt(folder, record)
    return record
