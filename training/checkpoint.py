"""Training state on disk: sharded tensors in safetensors, the rest in JSON; a checkpoint exists once all of it is there.

checkpoints/step_00000200/    shard-0000R-….safetensors (one per rank that had something to write)  state.json
checkpoints/LATEST            a hint; the newest folder that verifies is what counts

They lie in a folder or under a URL (`checkpoint_places`).
Tensors carry the names model/…, ema/… and optimizer/…/slot and their place in the whole, so that any number of ranks
reads what any other number wrote. Written by `torch.distributed.checkpoint`, through its safetensors storage: its own
file system storage pickles the index.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from data import storage
from data.errors import CorruptArtifact
from training import checkpoint_facts, distributed
from training.checkpoint_places import Place, place_of, sha256
from training.ema import Ema

log = logging.getLogger("darkroom.checkpoint")

T = TypeVar("T")
KEEP = 2
DEADLINE = timedelta(minutes=30)
"""Longest wait for the other ranks, and for a write."""

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainState:
    """All that a step changes. `clock` is the number of optimizer steps done; the data cursor follows from it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    clock: int = 0
    curve: list[dict[str, Any]] | None = None
    pending: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm) of the steps since the curve's last row, means over ranks."""


class Saver:
    """Commits checkpoints under `folder` while training goes on: a save copies the state, a thread writes the copy.

    At most one write is in flight: the next save, `wait` and the end of the `with` block wait for it and raise what went
    wrong, on every rank. Kept are the newest `keep` checkpoints and the one with the lowest validation loss. `before` is
    called when a save begins: what a resumed training will not tell again must be safe by then. Collective: every rank makes
    one and calls it alike.
    """

    def __init__(
        self,
        folder: Path | str,
        identity: str,
        *,
        keep: int = KEEP,
        max_steps: int | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.identity, self.keep, self.max_steps = folder, identity, keep, max_steps
        self._before, self._place = before, place_of(folder)
        is_cuda = distributed.device().type == "cuda"
        self._stager = DefaultStager(StagingOptions(is_cuda, False, False, is_cuda))
        self._group = dist.new_group(backend="gloo", timeout=DEADLINE) if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failure:
            if kind is None:
                raise
            log.warning("the last checkpoint was not written: %s", failure)
        finally:
            self._stager.close()

    def save(self, state: TrainState) -> None:
        """Begins a checkpoint of `state`; returns once the state may change again.

        Replaces one of the same step: `restore` would have taken it if it had been intact.
        """
        self.wait()
        self._before()
        tensors, groups = _tensors(state)
        staged = self._stager.stage(tensors)
        facts = {
            "identity": self.identity,
            "clock": state.clock,
            "max_steps": self.max_steps,
            "curve": state.curve,
            "pending": list(state.pending),
            "validation_loss": _validation_loss(state.curve),
            "groups": groups,
        }
        self._thread = threading.Thread(
            target=self._run, args=(staged, facts), daemon=True, name="darkroom-checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns once nothing is in flight; raises what the last write failed of."""
        if self._thread is not None:
            self._thread.join(DEADLINE.total_seconds())
            if self._thread.is_alive():
                raise TimeoutError(
                    f"a checkpoint under {self.folder} was not written within {DEADLINE}: is the file system there?"
                )
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        try:
            self._write(tensors, facts)
        except (Exception, CheckpointException) as error:
            self._failure = _cause(error)

    def _write(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        place, name = self._place, f"step_{facts['clock']:08d}"
        self._on_first_rank(lambda: place.begin(name))
        draft = self._on_every_rank(lambda: place.draft(name))
        written = self._on_every_rank(lambda: self._write_part(tensors, name, draft))
        everything = {file: found for part in self._gathered(written) for file, found in part.items()}
        facts["sha256"] = {file: digest for file, (digest, _) in everything.items()}
        facts["bytes"] = {file: size for file, (_, size) in everything.items()}
        self._on_first_rank(lambda: place.commit(name, facts, self.keep))

    def _write_part(self, tensors: dict[str, Tensor], name: str, draft: Path) -> dict[str, tuple[str, int]]:
        """Brings this rank's tensors to where they can be committed; file -> its digest and size. Collective."""
        _write_tensors(tensors, draft, self._group)
        mine = sorted(draft.glob(f"shard-{distributed.rank() + 1:05d}-*"))
        written = {path.name: (sha256(path), path.stat().st_size) for path in mine}
        self._place.keep(name, draft, mine)
        return written

    def _on_first_rank(self, action: Callable[[], None]) -> None:
        """Rank 0 does it, and all go on when it is done, or raise what it raised."""
        self._on_every_rank(action if distributed.rank() == 0 else lambda: None)

    def _on_every_rank(self, action: Callable[[], T]) -> T:
        """What this rank's action returns, when all have done theirs; else raises, everywhere, what the first of them raised."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = action()
        except (Exception, CheckpointException) as error:
            failure = _cause(error)
        if failure := next(filter(None, self._gathered(failure)), None):
            raise failure
        return cast(T, result)

    def _gathered(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values = [None] * distributed.world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def save(folder: Path | str, state: TrainState, identity: str, *, keep: int = KEEP) -> None:
    """One checkpoint of `state`, on disk when this returns. Collective."""
    with Saver(folder, identity, keep=keep) as saver:
        saver.save(state)


def restore(folder: Path | str, state: TrainState, identity: str) -> bool:
    """Loads the newest checkpoint under `folder` that verifies; returns whether there was one. Collective.

    A damaged checkpoint is passed over with a warning; one of another `identity` (model, data or config) is an error.
    """
    place = place_of(folder)
    for name in distributed.gathered(place.names())[0]:
        if opened := _opened(place, name):
            facts, tensors = opened
            checkpoint_facts.refuse_another(storage.join(str(folder), name), facts, identity)
            _load(tensors, state, facts)
            return True
    return False


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the unsharded, unwrapped state dict of `model` on the CPU of rank 0 (elsewhere possibly empty). Collective."""
    weights = get_model_state_dict(model, options=_WHOLE)
    # of one process on the CPU these are the parameters themselves, not copies
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _tensors(state: TrainState) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The live tensors of `state` by their names on disk, and the optimizer's groups; sharded ones stay sharded."""
    optimizer = get_optimizer_state_dict(state.model, state.optimizer)
    tensors = {f"model/{name}": tensor for name, tensor in get_model_state_dict(state.model).items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in state.ema.state_dict().items()}
    for name, held in optimizer["state"].items():
        tensors |= {f"optimizer/{name}/{slot}": tensor for slot, tensor in held.items()}
    return tensors, optimizer["param_groups"]


def _load(candidate: Path, state: TrainState, facts: dict[str, Any]) -> None:
    tensors, _ = _tensors(state)
    with warnings.catch_warnings():  # that a world of one is a world of one
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(candidate)))
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for path, tensor in tensors.items():
        part, _, name = path.partition("/")
        parts[part][name] = tensor
    set_model_state_dict(state.model, parts["model"])
    slots: dict[str, dict[str, Tensor]] = {}
    for path, tensor in parts["optimizer"].items():
        name, _, slot = path.rpartition("/")
        slots.setdefault(name, {})[slot] = tensor
    set_optimizer_state_dict(state.model, state.optimizer, {"state": slots, "param_groups": facts["groups"]})
    state.clock, state.curve, state.pending = facts["clock"], facts["curve"], facts["pending"]


def _write_tensors(tensors: dict[str, Tensor], staging: Path, group: dist.ProcessGroup | None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # channels-last weights are not
    if group is None:  # what the storage below would write, without its warning that this is a world of one
        name = staging / "shard-00001-model-00001-of-00001.safetensors"
        save_file(tensors, name)
        return
    writer = HuggingFaceStorageWriter(str(staging), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, process_group=group)


def _validation_loss(curve: list[dict[str, Any]] | None) -> float | None:
    """The newest one that the curve holds."""
    losses = [row.get("validation_loss") for row in curve or []]
    return next((loss for loss in reversed(losses) if loss is not None), None)


def _opened(place: Place, name: str) -> tuple[dict[str, Any], Path] | None:
    """The facts of a whole checkpoint, and where its tensors lie; None, with a warning, for a damaged one. Collective."""
    facts, tensors, problem = {}, Path(), ""
    try:
        facts = place.read(name)
        tensors = place.open(name, facts)
    except (OSError, ValueError, KeyError, AttributeError, CorruptArtifact) as error:
        problem = str(error) or type(error).__name__
    problems = [found for found in distributed.gathered(problem) if found]
    if problems and distributed.rank() == 0:
        log.warning("passing over damaged checkpoint %s: %s", name, problems[0])
    return None if problems else (facts, tensors)


def _cause(error: BaseException) -> Exception:
    """What a user can act on, such as a full disk, behind what `torch.distributed.checkpoint` raises."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, Exception)]
        named = next((cause for cause in causes if isinstance(cause, OSError)), None)
        return named or next(iter(causes), RuntimeError(str(error)))
    assert isinstance(error, Exception)
    return error
