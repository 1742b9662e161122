"""The steps of a production training on two ranks: sharded, compiled block by block, recomputed, in bf16, in parts."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor.debug import CommDebugMode

from tests.training.conftest import MemoryColumns
from training import checkpoint, distributed, execution, loop, spikes
from training.checkpoint import TrainState
from training.systems import denoiser, prior
from training.systems.system import Batch, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
import worlds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
NAMES = ("denoiser", "prior")
STEPS = 3
ALL_ON = {"fsdp": True, "compile": True, "activation_checkpointing": True}
"""What the recipe `unclip` sets, besides its precision; compilation is on there since it has GPUs."""


def _trainable(name: str, **changes: Any) -> Any:
    options = {"batch_size": 12, "ema_decay": 0.9, "warmup_steps": 0, "learning_rate": 0.01, **changes}
    columns = MemoryColumns()
    if name == "prior":
        config = prior.PriorConfig(num_attention_heads=2, num_layers=2, **options)
        return prior.fit(config, columns)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "num_attention_heads": 2}
    config = denoiser.DenoiserConfig(prediction_type="v_prediction", **sizes, **options)
    return denoiser.fit(config, columns)


def _batch(trainable: Any, step: int) -> Batch:
    """This rank's share of the twelve samples."""
    share = 12 // distributed.world_size()
    mine = range(distributed.rank() * share, (distributed.rank() + 1) * share)
    batch = MemoryColumns().batch(trainable.columns, mine)
    return {**batch, "position": batch["position"] + 12 * step}


def _step(trainable: Any, state: TrainState) -> list[float]:
    """[loss, gradient norm] of the next step, means over ranks."""
    config: TrainConfig = trainable.config
    batch = _batch(trainable, state.clock)
    losses, norm = loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model)
    state.clock += 1
    return [float(distributed.mean_over_ranks(losses.mean())), float(norm)]


def _found(state: TrainState, steps: list[list[float]]) -> dict[str, Tensor]:
    """Weights, averages and figures of the steps, whole, on the CPU of rank 0."""
    weights = checkpoint.whole_weights(state.model)
    with state.ema.swapped_in():
        averages = checkpoint.whole_weights(state.model)
    return {
        **{name: tensor.contiguous() for name, tensor in weights.items()},
        **{f"ema.{name}": tensor.contiguous() for name, tensor in averages.items()},
        "steps": torch.tensor(steps),
    }


def _plain(name: str, **changes: Any) -> dict[str, Tensor]:
    """What one process finds that does nothing but the arithmetic."""
    trainable = _trainable(name, compile=False, **changes)
    state = loop.build_state(trainable, trainable.config)
    return _found(state, [_step(trainable, state) for _ in range(STEPS)])


def _assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], name: str, off: float) -> None:
    """Figures of every step, and how far the weights are off, as a share of their way from fresh ones: below `off`."""
    trainable = _trainable(name, compile=False)
    fresh = _found(loop.build_state(trainable, trainable.config), [[0.0, 0.0]] * STEPS)
    assert found.keys() == expected.keys() == fresh.keys()
    torch.testing.assert_close(found["steps"], expected["steps"], rtol=min(off, 0.02), atol=0)
    for names in ([n for n in fresh if n[:4] == "ema."], [n for n in fresh if n[:4] not in ("ema.", "step")]):
        apart, way = (
            torch.cat([(one[n] - expected[n]).flatten() for n in names]).norm() for one in (found, fresh)
        )
        assert apart < off * way


def run_all_on(folder: str, precision: str) -> None:
    """Three steps of each trainable with everything on: one graph per kind of block, no break, nothing compiled anew."""
    execution.prepared = functools.partial(execution.prepared, backend="aot_eager")
    for name in NAMES:
        torch._dynamo.reset()
        counters.clear()
        trainable = _trainable(name, precision=precision, **ALL_ON)
        state = loop.build_state(trainable, trainable.config)
        steps = [_step(trainable, state)]
        graphs = counters["stats"]["unique_graphs"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            steps += [_step(trainable, state) for _ in range(STEPS - 1)]
        assert counters["stats"]["unique_graphs"] == graphs > 0 and not counters["graph_break"]
        _leave(_found(state, steps), folder, name)


def _leave(found: dict[str, Tensor], folder: str, name: str) -> None:
    if distributed.rank() == 0:
        save_file(found, Path(folder) / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("precision", "off"), [("fp32", 1e-3), ("bf16", 0.2)]
)  # AdamW's first steps go by the signs of gradients, some of which bf16 turns
def test_sharded_compiled_recomputed_steps_are_those_of_a_plain_process(
    tmp_path: Path, precision: str, off: float
) -> None:
    worlds.run(__file__, "run_all_on", 2, str(tmp_path), precision)
    for name in NAMES:
        found = load_file(tmp_path / f"{name}.safetensors")
        _assert_alike(found, _plain(name, precision=precision), name, off)


def run_in_parts(folder: str) -> None:
    """The denoiser's steps, sharded, with each rank's six samples in three parts; gradients travel once a step."""
    counts = []
    for accumulate in (1, 3):
        trainable = _trainable("denoiser", fsdp=True, compile=False, accumulate=accumulate)
        state = loop.build_state(trainable, trainable.config)
        with CommDebugMode() as sent:
            steps = [_step(trainable, state) for _ in range(STEPS)]
        counts.append(sent.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_])
    groups = len(execution.blocks(state.model)) + 1
    assert counts == [STEPS * groups] * 2
    _leave(_found(state, steps), folder, "denoiser")


def test_a_sharded_step_in_parts_is_that_of_the_large_batch_and_sends_gradients_once(tmp_path: Path) -> None:
    worlds.run(__file__, "run_in_parts", 2, str(tmp_path))
    _assert_alike(load_file(tmp_path / "denoiser.safetensors"), _plain("denoiser"), "denoiser", 1e-3)
