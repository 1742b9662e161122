"""A checkpoint belongs to no world size: what some ranks wrote, any other number reads, to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import checkpoint, distributed, loop, spikes
from training.checkpoint import Saver, TrainState
from training.systems.system import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
import worlds
from test_loop import CONFIG, Regression, _batches

pytestmark = pytest.mark.slow


def _whole(state: TrainState) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint._tensors(state)
    return {name: distributed.whole(tensor).contiguous() for name, tensor in tensors.items()}


def write(folder: str, fsdp: bool) -> None:
    """Trains two steps, and saves a checkpoint and, whole, what it should hold."""
    config = _config(fsdp)
    state, trainable = loop.build_state(Regression(), config), Regression()
    if not fsdp:  # as channels-last convolutions are: their memory is in another order than their shape
        for weight in (p for p in state.model.parameters() if p.ndim == 2):
            weight.data = weight.data.t().contiguous().t()
    for batch in _batches(config, 2)(0):
        loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model)
        state.clock += 1
    with Saver(Path(folder) / "checkpoints", "one") as saver:
        saver.save(state)
    whole = _whole(state)
    if distributed.rank() == 0:
        save_file(whole, Path(folder) / "whole.safetensors")


def read(folder: str, fsdp: bool) -> None:
    """Restores it, and compares every tensor with what it should be."""
    state = loop.build_state(Regression(), _config(fsdp, seed=99))
    assert checkpoint.restore(Path(folder) / "checkpoints", state, "one") and state.clock == 2
    expected, found = load_file(Path(folder) / "whole.safetensors"), _whole(state)
    assert found.keys() == expected.keys() and len(found) > 20
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert [group["weight_decay"] for group in state.optimizer.param_groups] == [0.01, 0.0]


def _config(fsdp: bool, **changes: object) -> TrainConfig:
    return CONFIG.model_copy(update={"batch_size": 24, "fsdp": fsdp, **changes})


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_checkpoint_of_four_ranks_is_read_by_one_two_and_eight(tmp_path: Path, fsdp: bool) -> None:
    worlds.run(__file__, "write", 4, str(tmp_path), fsdp)
    names = sorted(path.name[:11] for path in (tmp_path / "checkpoints" / "step_00000002").glob("shard-*"))
    assert names == [f"shard-{rank:05d}" for rank in (1, 2, 3, 4)], "every rank wrote its part"
    facts = json.loads((tmp_path / "checkpoints" / "step_00000002" / "state.json").read_text())
    assert len(facts["sha256"]) == 4
    for size in (1, 2, 8):
        worlds.run(__file__, "read", size, str(tmp_path), fsdp)
