"""What a step costs in floating-point operations, and which share of its device's peak that is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

PEAK_BF16_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10": 125e12,
    "A10G": 70e12,
}
"""Dense bf16 operations per second by NVIDIA's data sheets, the more specific name first; each is words of a device's name."""


class Recorded:
    """`model` as a callable that remembers the shapes and dtypes of what it was last called with."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.arguments = tree_map(_shape_only, (args, kwargs))
        return self.model(*args, **kwargs)


def forward_backward_flops(build: Callable[[], nn.Module], recorded: Recorded) -> int:
    """Operations of one forward and backward pass of `build()` over arguments like the recorded, recomputation apart.

    A multiply-add counts as two. Counted on the meta device: no memory, no arithmetic.
    """
    assert recorded.arguments is not None, "the network was never called"
    args, kwargs = recorded.arguments
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = build()
    with FlopCounterMode(display=False) as counter:
        outputs = [leaf for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        torch.autograd.backward([out.sum() for out in outputs if out.requires_grad])
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak per second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = (peak for known, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{known}\b", name))
    return next(found, None)


def _shape_only(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
