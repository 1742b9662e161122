"""Training state on disk: tensors in safetensors, the rest in JSON; a checkpoint exists once its folder has its final name.

checkpoints/step_00000200/    model.safetensors  ema.safetensors  optimizer.safetensors  state.json
checkpoints/LATEST            a hint; the newest folder that verifies is what counts
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training import distributed
from training.ema import Ema

log = logging.getLogger("darkroom.checkpoint")

KEEP = 2
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainState:
    """All that a step changes. `clock` is the number of optimizer steps done; the data cursor follows from it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    clock: int = 0
    curve: list[dict[str, float]] | None = None
    pending: list[float] = field(default_factory=list)
    """Losses of the steps since the curve's last row, mean over ranks."""


def save(folder: Path, state: TrainState, identity: str) -> None:
    """Commits a checkpoint of `state` under `folder`; collective: every rank calls it, rank 0 writes.

    Replaces one of the same step: `restore` would have taken it if it had been intact.
    """
    target = folder / f"step_{state.clock:08d}"
    model = whole_weights(state.model)
    optimizer = get_optimizer_state_dict(state.model, state.optimizer, options=_WHOLE)
    ema = {name: distributed.whole(tensor).cpu() for name, tensor in state.ema.state_dict().items()}
    if distributed.rank() == 0:
        slots = {f"{name}/{slot}": v for name, held in optimizer["state"].items() for slot, v in held.items()}
        tensors = {"model": model, "ema": ema, "optimizer": slots}
        progress = {"clock": state.clock, "curve": state.curve, "pending": state.pending}
        _write(target, tensors, {"identity": identity, **progress, "groups": optimizer["param_groups"]})
        _prune(folder, target)
    distributed.barrier()


def restore(folder: Path, state: TrainState, identity: str) -> bool:
    """Loads the newest checkpoint under `folder` that verifies; returns whether there was one.

    A damaged checkpoint is passed over with a warning; one of another `identity` (model, data or config) is an error.
    """
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        facts = _verified(candidate)
        if facts is None:
            continue
        if facts["identity"] != identity:
            raise ValueError(
                f"{candidate} belongs to {facts['identity']}, not to {identity}: remove it or train elsewhere"
            )
        _load(candidate, state, facts)
        return True
    return False


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the unsharded, unwrapped state dict of `model` on the CPU of rank 0 (elsewhere possibly empty). Collective."""
    weights = get_model_state_dict(model, options=_WHOLE)
    # of one process on the CPU these are the parameters themselves, not copies
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def _write(target: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    staging = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    staging.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            save_file({k: v.contiguous() for k, v in group.items()}, staging / f"{name}.safetensors")
        facts["sha256"] = {
            f"{name}.safetensors": _sha256(staging / f"{name}.safetensors") for name in tensors
        }
        (staging / "state.json").write_text(json.dumps({**facts, "digest": _digest(facts)}))
        _sync(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    pointer = target.with_name(f".tmp-{secrets.token_hex(6)}-LATEST")
    pointer.write_text(target.name)
    pointer.replace(target.with_name("LATEST"))


def _verified(candidate: Path) -> dict[str, Any] | None:
    try:
        facts = json.loads((candidate / "state.json").read_text())
        if facts.pop("digest") != _digest(facts):
            raise ValueError("state.json changed on disk")
        damaged = [name for name, digest in facts["sha256"].items() if _sha256(candidate / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("passing over damaged checkpoint %s: %s", candidate.name, error)
        return None
    if damaged:
        log.warning(
            "passing over damaged checkpoint %s: %s changed on disk", candidate.name, ", ".join(damaged)
        )
        return None
    return facts


def _load(candidate: Path, state: TrainState, facts: dict[str, Any]) -> None:
    set_model_state_dict(state.model, load_file(candidate / "model.safetensors"), options=_WHOLE)
    slots: dict[str, dict[str, Tensor]] = {}
    for path, tensor in load_file(candidate / "optimizer.safetensors").items():
        name, _, slot = path.rpartition("/")
        slots.setdefault(name, {})[slot] = tensor
    optimizer = {"state": slots, "param_groups": facts["groups"]}
    set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=_WHOLE)
    state.ema.load_state_dict(load_file(candidate / "ema.safetensors"))
    state.clock, state.curve, state.pending = facts["clock"], facts["curve"], facts["pending"]


def _prune(folder: Path, newest: Path) -> None:
    steps = sorted(folder.glob("step_*"))
    kept = [step for step in steps if step.name <= newest.name][-KEEP:]
    for step in set(steps) - set(kept):  # what is newer than the newest was passed over as damaged
        shutil.rmtree(step, ignore_errors=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
