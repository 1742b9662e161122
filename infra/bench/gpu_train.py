"""How fast training steps are on one GPU: the loop's own step on random latents of real shape, no Ray, no files.

    python infra/bench/gpu_train.py [--only unet dit prior] [--batch-size 64] [--steps 40] [--eager] [--json result.json]

    unet    Stable Diffusion 2's U-Net at 512 px (latents 4 x 64 x 64), eps-prediction, text states of 77 x 1024
    dit     DiT-XL/2 at 512 px, flow matching, class labels
    prior   a prior of 24 layers, 1024 wide, on 768-wide embeddings

bf16 autocast, fp32 weights, fused AdamW, clipping, moving average, torch.compile unless `--eager`. A figure is the median
over windows of steps between two waits for the device. Prints rows for RESULTS.md. `--tiny` shrinks everything so that a CPU
runs it in seconds: it shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import RandomColumns

from training import distributed, flops, loop, spikes
from training.diffusion.objective import Objective, per_sample_mse
from training.randomness import Draws
from training.systems import denoiser, prior
from training.systems.system import Batch, TrainConfig
from training.window import Window

WINDOW = 5
"""Steps between two waits."""


@dataclass(frozen=True)
class DiT:
    """DiT-XL/2 (Peebles & Xie 2022, arXiv 2212.09748) by flow matching on stored latents: what the step is timed on."""

    config: TrainConfig
    side: int = 64
    num_layers: int = 28
    num_attention_heads: int = 16
    columns: tuple[str, ...] = ("vae_moments",)

    def build(self) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            sample_size=self.side,
            num_layers=self.num_layers,
            num_attention_heads=self.num_attention_heads,
            attention_head_dim=72,
            out_channels=4,
        )

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        objective = Objective("flow")
        x0 = batch["vae_moments"].chunk(2, dim=1)[0]
        noise = draws.normal("dit.noise", x0.shape[1:])
        t = objective.timesteps(draws.uniform("dit.timestep"), draws.normal("dit.timestep"))
        labels = draws.integers("dit.label", 1000)
        output = model(objective.noised(x0, noise, t), t.floor(), labels, return_dict=False)[0]
        return per_sample_mse(output, objective.target(x0, noise, t))

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        raise NotImplementedError("nothing is published here")


@dataclass(frozen=True)
class Figures:
    """One network's speed; medians over the windows."""

    what: str
    device: str
    torch: str
    samples_per_s: float
    tflops_per_s: float
    mfu: float | None
    peak_gib: float | None
    first_step_s: float
    """With compilation."""


def unet(options: Any, run: dict[str, Any]) -> tuple[str, Any, RandomColumns]:
    """Stable Diffusion 2's U-Net with an image embedding beside the text."""
    sizes: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "num_attention_heads": (5, 10, 20, 20),
        "norm_num_groups": 32,
    }
    shapes = {"vae_moments": (8, 64, 64), "img_emb": (1024,), "text_hidden": (77, 1024)}
    if options.tiny:
        sizes = {"block_out_channels": (16, 16), "num_attention_heads": 2, "norm_num_groups": 4}
        shapes = {"vae_moments": (8, 8, 8), "img_emb": (16,), "text_hidden": (7, 16)}
    config = denoiser.DenoiserConfig(prediction_type="epsilon", **sizes, **run)
    columns = RandomColumns(shapes)
    return "SD2-class U-Net, 512 px", denoiser.fit(config, columns), columns


def dit(options: Any, run: dict[str, Any]) -> tuple[str, Any, RandomColumns]:
    """DiT-XL/2."""
    sizes = {"side": 8, "num_layers": 1, "num_attention_heads": 1} if options.tiny else {}
    trainable = DiT(TrainConfig(**run), **sizes)
    return "DiT-XL/2, 512 px", trainable, RandomColumns({"vae_moments": (8, trainable.side, trainable.side)})


def the_prior(options: Any, run: dict[str, Any]) -> tuple[str, Any, RandomColumns]:
    """24 layers of 1024."""
    sizes = {"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64}
    width = 768
    if options.tiny:
        sizes, width = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}, 16
    columns = RandomColumns({"img_emb": (width,), "text_emb": (width,), "text_hidden": (77, width)})
    return "prior, 24 layers", prior.fit(prior.PriorConfig(**sizes, **run), columns), columns


NETWORKS: dict[str, tuple[Callable[..., Any], int]] = {
    "unet": (unet, 64),
    "dit": (dit, 32),
    "prior": (the_prior, 512),
}
"""name -> (what builds it, samples per step)."""


def measured(name: str, options: Any) -> Figures:
    """Steps of one network, timed window by window."""
    build, batch_size = NETWORKS[name]
    count = 4 if options.tiny else options.batch_size or batch_size
    run = {"batch_size": count, "precision": "bf16", "compile": not options.eager, "max_steps": 10_000}
    what, trainable, columns = build(options, run)
    device = distributed.device()
    state = loop.build_state(trainable, trainable.config)
    window = Window(trainable, trainable.config, state, str)
    batch = columns.batch(trainable.columns, count, device)
    network = flops.Recorded(state.model)
    started = time.perf_counter()
    steps(1, trainable, state, window, batch, network)
    first = time.perf_counter() - started
    per_step = flops.forward_backward_flops(trainable.build, network)
    steps(3, trainable, state, window, batch, state.model)
    seconds = []
    for _ in range(max(1, options.steps // WINDOW)):
        start = time.perf_counter()
        steps(WINDOW, trainable, state, window, batch, state.model)
        seconds.append((time.perf_counter() - start) / WINDOW)
    rate, peak = per_step / median(seconds), flops.peak_flops(device)
    on_gpu = device.type == "cuda"
    return Figures(
        what=f"{'tiny: ' if options.tiny else ''}{what}, batch {count}{', eager' if options.eager else ''}",
        device=torch.cuda.get_device_name(device) if on_gpu else "CPU",
        torch=torch.__version__.split("+")[0],
        samples_per_s=count / median(seconds),
        tflops_per_s=rate / 1e12,
        mfu=rate / peak if peak else None,
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        first_step_s=first,
    )


def steps(count: int, trainable: Any, state: Any, window: Window, batch: Batch, network: Any) -> None:
    """That many steps of the loop, then a wait for the device."""
    for _ in range(count):
        left = loop.step(trainable, state, batch, trainable.config, spikes.NO_LIMIT, network)
        window.add(*left, batch["position"])
        state.clock += 1
    window.look(state.clock)
    window.steps.clear()


def main() -> None:
    """Measures the networks and prints their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, help="samples per step; default: what fits 80 GB")
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each network")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a smoke test for machines without a GPU")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no CUDA device here; --tiny shows on a CPU that the script works")
    found = [measured(name, options) for name in options.only]
    table = Table("GPU", "torch", "what", "samples/s", "TFLOP/s", "MFU", "peak GiB", "first step, s")
    for f in found:
        share = "" if f.mfu is None else f"{f.mfu:.3f}"
        memory = "" if f.peak_gib is None else f"{f.peak_gib:.1f}"
        numbers = (
            f"{f.samples_per_s:,.1f}",
            f"{f.tflops_per_s:,.1f}",
            share,
            memory,
            f"{f.first_step_s:.0f}",
        )
        table.add_row(f.device, f.torch, f.what, *numbers)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
