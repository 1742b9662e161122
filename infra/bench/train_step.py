"""What a training step costs beside a bare loop over the same model, batch and optimizer, on the CPU.

    OMP_NUM_THREADS=1 python infra/bench/train_step.py [--rounds 40] [--threads 1] [--json result.json]

Ours is what the loop does per step: seeded draws, loss, backward, clipping, the check for spikes, AdamW, the moving average,
the window of the curve. The bare loop is the fewest lines that train the same network on the same batch: torch's own random
numbers, loss, backward, clipping, AdamW. Both go in turns, step by step; a figure is a median, a ratio the median of ratios.

    denoiser    the demo's U-Net at batch 32: wall ours / bare, and the moving average's share of a step
    tiny        a two-layer perceptron on 16 samples: microseconds of our step over the bare one
    encoding    the denoiser's step from stored columns against encoding pictures and captions in every step
    unclip      the same for one sample of the `unclip` recipe at its true sizes: forward and backward pass, no optimizer, which
                a sample's share of a batch of hundreds would not show; takes 15 GB, and runs only when it is named
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from embed import SD_VAE

from flows.recipes import demo, unclip
from training import loop, optim, spikes
from training.randomness import Draws
from training.systems import clip, denoiser, vae
from training.systems.embeddings import chosen
from training.systems.system import Batch, TrainConfig
from training.window import Window

CLIP_GRAD_NORM = 1.0


class RandomColumns:
    """`Columns` of random rows of real shape: nothing is read, every sample is another."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    def __len__(self) -> int:
        return 64

    def shape(self, column: str) -> tuple[int, ...]:
        return self.shapes[column]

    def rows(self, column: str, indices: Sequence[int]) -> np.ndarray:
        values = np.random.default_rng(0).normal(size=(len(indices), *self.shapes[column]))
        if column.endswith("_emb"):
            values /= np.linalg.norm(values, axis=-1, keepdims=True)
        return values.astype(np.float32)

    def empty(self, column: str) -> np.ndarray:
        return self.rows(column, [0])[0]

    def facts(self, column: str) -> Mapping[str, Any]:  # noqa: ARG002
        return {"scaling_factor": 1.0}

    def maker(self, column: str) -> str | None:  # noqa: ARG002
        return None

    def batch(self, names: Sequence[str], count: int, device: torch.device | str = "cpu") -> Batch:
        """What the loader yields at step 0."""
        fields: Batch = {name: torch.from_numpy(self.rows(name, range(count))) for name in names}
        if "text_hidden" in fields:
            fields["text_length"] = torch.full((count,), self.shapes["text_hidden"][0])
        fields["position"] = torch.arange(count)
        return {name: values.to(device) for name, values in fields.items()}


class Perceptron:
    """The smallest trainable: what a step costs beside it is the engine's own."""

    columns = ("img_emb",)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:  # noqa: ARG002
        return F.mse_loss(model(batch["img_emb"]), batch["img_emb"], reduction="none").mean(1)

    def publish(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        raise NotImplementedError("nothing is published here")


def our_step(trainable: Any, config: TrainConfig, batch: Batch) -> tuple[Callable[[], None], Any]:
    """(one step of the loop, its state)."""
    state = loop.build_state(trainable, config)
    window = Window(trainable, config, state, str)

    def step() -> None:
        window.add(
            *loop.step(trainable, state, batch, config, spikes.NO_LIMIT, state.model), batch["position"]
        )
        state.clock += 1
        if len(window.steps) == 20:
            window.steps.clear()

    return step, state


def bare_step(
    model: nn.Module, config: TrainConfig, loss: Callable[[nn.Module], Tensor]
) -> Callable[[], None]:
    """The same with nothing of ours but the parameter groups."""
    optimizer = optim.build_optimizer(model, config)

    def step() -> None:
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_denoiser_loss(trainable: denoiser.Denoiser, batch: Batch) -> Callable[[nn.Module], Tensor]:
    """The denoiser's flow-matching loss with torch's own generator."""
    config = trainable.config
    count = len(batch["position"])

    def loss(model: nn.Module) -> Tensor:
        mean, logvar = batch["vae_moments"].chunk(2, dim=1)
        x0 = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        noise = torch.randn_like(x0)
        t = torch.sigmoid(config.logit_mean + config.logit_std * torch.randn(count))
        level = torch.randint(config.max_noise_level, (count,))
        embedding = torch.randn_like(batch["img_emb"])
        labels = denoiser.noised_embedding(batch["img_emb"], embedding, level, trainable.mean, trainable.std)
        drop = torch.rand(count)
        labels = chosen(drop < config.image_drop, torch.zeros_like(labels), labels)
        hidden = chosen(drop < config.caption_drop, trainable.empty_hidden, batch["text_hidden"])
        at = t.view(-1, 1, 1, 1)
        output = model(
            (1 - at) * x0 + at * noise,
            (1000 * t).floor(),
            encoder_hidden_states=hidden,
            class_labels=labels,
            return_dict=False,
        )[0]
        return F.mse_loss(output, noise - x0)

    return loss


def denoiser_race(rounds: int) -> dict[str, float]:
    """Our step beside the bare one on the demo's U-Net, and the moving average's share."""
    trainable, config, batch = demo_denoiser()
    ours, state = our_step(trainable, config, batch)
    bare = bare_step(copy.deepcopy(state.model), config, bare_denoiser_loss(trainable, batch))
    pairs = in_turns([ours, bare], rounds)
    averages = [timed(lambda: state.ema.update(10_000))[0] for _ in range(rounds)]
    return {
        "ours_ms": 1e3 * median(p[0][0] for p in pairs),
        "bare_ms": 1e3 * median(p[1][0] for p in pairs),
        "wall_ratio": median(p[0][0] / p[1][0] for p in pairs),
        "cpu_ratio": median(p[0][1] / p[1][1] for p in pairs),
        "ema_share": median(averages) / median(p[0][0] for p in pairs),
    }


def tiny_race(rounds: int) -> dict[str, float]:
    """Microseconds that our step adds to the bare one of a perceptron, over runs of 20 steps."""
    trainable, config = Perceptron(), TrainConfig(batch_size=16)
    batch = RandomColumns({"img_emb": (16,)}).batch(["img_emb"], 16)
    ours, state = our_step(trainable, config, batch)
    model = copy.deepcopy(state.model)
    bare = bare_step(model, config, lambda m: trainable.loss(m, batch, Draws(0, batch["position"])).mean())
    pairs = in_turns([lambda: repeat(ours, 20), lambda: repeat(bare, 20)], rounds)
    return {
        "ours_us": 1e6 / 20 * median(p[0][0] for p in pairs),
        "bare_us": 1e6 / 20 * median(p[1][0] for p in pairs),
        "overhead_us": 1e6 / 20 * median(p[0][0] - p[1][0] for p in pairs),
        "overhead_cpu_us": 1e6 / 20 * median(p[0][1] - p[1][1] for p in pairs),
    }


def encoding_race(rounds: int) -> dict[str, float]:
    """The denoiser's step from stored columns, and with the demo's encoders run on every batch before it."""
    trainable, config, batch = demo_denoiser()
    ours, _ = our_step(trainable, config, batch)
    recipe = demo()
    size = recipe.shard.image_size
    images = torch.randint(0, 256, (len(batch["position"]), 3, size, size), dtype=torch.uint8)
    captions = [f"a large red circle on a blue background, number {i}" for i in range(len(images))]
    towers = clip.Clip(recipe.clip)
    vision = towers.build().eval()
    autoencoder = vae.Vae(recipe.vae, size, None).build().eval()  # type: ignore[arg-type]

    @torch.no_grad()
    def encode() -> None:
        tokens = clip.tokenized(tuple(captions), recipe.clip.context_length)
        vision(clip.preprocessed(images, clip.preprocess_config(recipe.clip)), tokens)
        autoencoder.vae.encode(images.float() / 127.5 - 1)

    def on_the_fly() -> None:
        encode()
        ours()

    return _stored_beside_encoded(in_turns([ours, on_the_fly], rounds))


def _stored_beside_encoded(pairs: list[list[tuple[float, float]]]) -> dict[str, float]:
    return {
        "steps_cpu_ratio": median(p[1][1] / p[0][1] for p in pairs),
        "stored_ms": 1e3 * median(p[0][0] for p in pairs),
        "on_the_fly_ms": 1e3 * median(p[1][0] for p in pairs),
        "steps_ratio": median(p[1][0] / p[0][0] for p in pairs),
    }


def unclip_race(rounds: int) -> dict[str, float]:
    """The `unclip` recipe's U-Net on one sample from stored columns, and with ViT-L/14 and SD's VAE run on it before."""
    import open_clip
    from diffusers import AutoencoderKL

    recipe = unclip()
    towers = open_clip.create_model("ViT-L-14").eval()
    autoencoder = AutoencoderKL(**SD_VAE).eval()
    columns = RandomColumns({"vae_moments": (8, 32, 32), "img_emb": (768,), "text_hidden": (77, 768)})
    config = recipe.denoiser.model_copy(update={"precision": "fp32", "activation_checkpointing": False})
    trainable = denoiser.fit(config, columns)
    batch, model = columns.batch(trainable.columns, 1), trainable.build()
    picture, small = torch.rand(1, 3, 256, 256), torch.rand(1, 3, 224, 224)
    tokens = open_clip.get_tokenizer("ViT-L-14")(["a red bicycle in front of a wall"])

    def ours() -> None:
        trainable.loss(model, batch, Draws(0, batch["position"])).mean().backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def encode() -> None:
        towers.encode_image(small)
        towers.encode_text(tokens)
        autoencoder.encode(2 * picture - 1)

    def on_the_fly() -> None:
        encode()
        ours()

    return _stored_beside_encoded(in_turns([ours, on_the_fly], rounds))


def demo_denoiser() -> tuple[denoiser.Denoiser, denoiser.DenoiserConfig, Batch]:
    """The demo's denoiser, its config, and a batch of random columns of the demo's shapes."""
    recipe = demo()
    channels, side = recipe.vae.latent_channels, recipe.shard.image_size // 4
    columns = RandomColumns(
        {
            "vae_moments": (2 * channels, side, side),
            "img_emb": (recipe.clip.embed_dim,),
            "text_hidden": (recipe.clip.context_length, recipe.clip.text_width),
        }
    )
    config = recipe.denoiser
    trainable = denoiser.fit(config, columns)
    return trainable, config, columns.batch(trainable.columns, config.batch_size)


def in_turns(works: list[Callable[[], None]], rounds: int) -> list[list[tuple[float, float]]]:
    """(wall, CPU) seconds of every work in every round, after two rounds to warm up; the first of a round changes."""
    found = []
    for number in range(-2, rounds):
        order = list(range(len(works)))[:: 1 if number % 2 else -1]
        times = {i: timed(works[i]) for i in order}
        found += [[times[i] for i in range(len(works))]] if number >= 0 else []
    return found


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """(seconds by the clock, CPU seconds of the whole process)."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def repeat(work: Callable[[], None], times: int) -> None:
    """Runs `work` that often."""
    for _ in range(times):
        work()


RACES = {
    "denoiser": denoiser_race,
    "tiny": tiny_race,
    "encoding": encoding_race,
    "unclip": unclip_race,
}
TARGETS = {
    "wall_ratio": "≤ 1.05",
    "cpu_ratio": "≤ 1.05",
    "ema_share": "≤ 0.05",
    "overhead_us": "≤ 300",
    "overhead_cpu_us": "≤ 300",
    "steps_ratio": "≥ 1.3",
    "steps_cpu_ratio": "≥ 1.3",
}


def main() -> None:
    """Runs the races, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="how often both go")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both")
    parser.add_argument("--only", nargs="+", choices=list(RACES), default=["denoiser", "tiny", "encoding"])
    parser.add_argument("--json", type=Path, help="where to write every figure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {name: RACES[name](options.rounds) for name in options.only}
    table = Table("race", "figure", "median", "target")
    for name, figures in found.items():
        for figure, value in figures.items():
            table.add_row(name, figure, f"{value:,.4g}", TARGETS.get(figure, ""))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
