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
from dataclasses import dataclass
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
_WHOLE_FLAT = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)


@dataclass
class TrainState:
    """All that a step changes. `clock` is the number of optimizer steps done; the data cursor follows from it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    clock: int = 0
    curve: list[dict[str, float]] | None = None


def save(folder: Path, state: TrainState, identity: str) -> None:
    """Commits a checkpoint of `state` under `folder`; collective: every rank calls it, rank 0 writes."""
    target = folder / f"step_{state.clock:08d}"
    model = whole_weights(state.model)
    optimizer = get_optimizer_state_dict(state.model, state.optimizer, options=_WHOLE_FLAT)
    ema = {name: _whole(tensor) for name, tensor in state.ema.state_dict().items()}
    if distributed.rank() == 0 and not target.exists():
        tensors = {
            "model": model,
            "ema": ema,
            "optimizer": {k: v for k, v in optimizer.items() if isinstance(v, Tensor)},
        }
        scalars = {k: v for k, v in optimizer.items() if not isinstance(v, Tensor)}
        facts = {"identity": identity, "clock": state.clock, "curve": state.curve, "optimizer": scalars}
        _write(target, tensors, facts)
        _prune(folder)
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
    """The unsharded, unwrapped state dict of `model` on the CPU of rank 0 (elsewhere possibly empty). Collective."""
    return get_model_state_dict(model, options=_WHOLE)


def _write(target: Path, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any]) -> None:
    staging = target.with_name(f".tmp-{secrets.token_hex(6)}-{target.name}")
    staging.mkdir(parents=True)
    try:
        for name, group in tensors.items():
            save_file(
                {k: v.detach().contiguous().clone() for k, v in group.items()},
                staging / f"{name}.safetensors",
            )
        facts["sha256"] = {
            f"{name}.safetensors": _sha256(staging / f"{name}.safetensors") for name in tensors
        }
        (staging / "state.json").write_text(json.dumps(facts))
        _sync(staging)
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
        damaged = [name for name, digest in facts["sha256"].items() if _sha256(candidate / name) != digest]
    except (OSError, ValueError, KeyError) as error:
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
    optimizer = {**facts["optimizer"], **load_file(candidate / "optimizer.safetensors")}
    set_optimizer_state_dict(state.model, state.optimizer, optimizer, options=_WHOLE_FLAT)
    state.ema.load_state_dict(load_file(candidate / "ema.safetensors"))
    state.clock, state.curve = facts["clock"], facts["curve"]


def _prune(folder: Path) -> None:
    for old in sorted(folder.glob("step_*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full else tensor).detach().cpu()


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
