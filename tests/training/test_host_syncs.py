"""A step never waits for its device: nothing in it asks for a value, and nothing but tokens is copied to the device anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from training import loop, spikes
from training.randomness import Draws
from training.systems import clip, denoiser, prior, vae
from training.systems.system import Columns
from training.window import Window

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.is_nonzero,
}


class Syncs(TorchDispatchMode):
    """Counts the operations whose results the host needs, and copies from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in WAITS:
            self.waits.append(str(func))
        if func.overloadpacket is aten._to_copy and args[0].device != result.device:
            self.copies.append(tuple(result.shape))
        return result


@pytest.fixture(params=["clip", "vae", "prior", "denoiser"])
def trainable(request, columns: Columns) -> Any:
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    tower = {"image_size": 16, "vision_layers": 1, "text_layers": 1, "context_length": 12}
    return {
        "clip": lambda: clip.fit(clip.ClipConfig(**tower), columns),
        "vae": lambda: vae.fit(vae.VaeConfig(**sizes, precision="bf16"), columns),
        "prior": lambda: prior.fit(prior.PriorConfig(num_layers=1, precision="bf16"), columns),
        "denoiser": lambda: denoiser.fit(denoiser.DenoiserConfig(min_snr_gamma=5.0, **sizes), columns),
    }[request.param]()


def test_a_step_asks_its_device_for_nothing(trainable, columns) -> None:
    config = trainable.config
    state = loop.build_state(trainable, config)
    window = Window(trainable, config, state, str)
    batch = columns.batch(trainable.columns, range(6))
    for step in range(2):
        with Syncs() as syncs:
            left = loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model)
            window.add(*left, batch["position"])
            state.clock += 1
        assert not syncs.waits, f"step {step}"
    with Syncs() as syncs:
        float(left[1])
    assert syncs.waits, "what asks is counted"


def test_after_the_first_step_nothing_is_copied_to_the_device_but_tokens(trainable, columns) -> None:
    with torch.device("meta"):
        model = trainable.build()
    batch = columns.batch(trainable.columns, range(6))
    batch = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    for _ in range(2):  # a value that anybody asked for would raise here: meta tensors have none
        with Syncs() as syncs:
            trainable.loss(model, batch, Draws(0, batch["position"])).mean().backward()
    assert syncs.copies == ([(6, 12)] if isinstance(trainable, clip.Clip) else [])
