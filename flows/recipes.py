"""Named runs as functions: a recipe is a frozen config of a whole system, edited by typed `--set` paths."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from data.config import Config, operational
from data.errors import UnknownPath, UserError
from data.shards import ShardConfig
from data.sources import SourceConfig
from stages.contract import FanoutConfig
from stages.embed import EmbedConfig
from stages.encode import EncodeConfig
from stages.evaluate import EvaluateConfig
from stages.generate import GenerateConfig
from training.systems.clip import ClipConfig
from training.systems.denoiser import DenoiserConfig
from training.systems.prior import PriorConfig
from training.systems.vae import VaeConfig


class EvaluationConfig(GenerateConfig, EvaluateConfig):
    """What is generated for evaluation, and what is measured of it."""


class Recipe(Config):
    """An unCLIP run: its source, its encoders, its prior and denoiser, its evaluation."""

    name: str = Field(description="what the run is called")
    summary: str = operational("", description="one line for `darkroom recipes`")
    seed: int = Field(0, ge=0, description="added to every training stage's own seed, and to generation's")
    source: SourceConfig = SourceConfig()
    shard: ShardConfig = ShardConfig()
    fanout: FanoutConfig = FanoutConfig()
    clip: ClipConfig = ClipConfig()
    embed: EmbedConfig = EmbedConfig()
    vae: VaeConfig = VaeConfig()
    encode: EncodeConfig = EncodeConfig()
    prior: PriorConfig = PriorConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    evaluate: EvaluationConfig = EvaluationConfig()
    expected_seconds: dict[str, float] = operational(
        {},
        description="measured wall time per stage on two CPU cores, until this root has timings of its own",
    )


def demo() -> Recipe:
    """Everything tiny: from 6,000 drawn scenes to an evaluated system in minutes on two CPU cores."""
    return Recipe(
        name="demo",
        summary="a complete unCLIP system on 32 px shapes (or your own pictures) in minutes, no GPU, no network",
        source=SourceConfig(kind="shapes"),
        shard=ShardConfig(samples_per_shard=1000, image_size=32, encode_format="png"),
    )


def unclip() -> Recipe:
    """The production system: ViT-L/14, Stable Diffusion's VAE at 256 px, a 1 B prior and a Stable-unCLIP-class U-Net."""
    return Recipe(
        name="unclip",
        summary="unCLIP in latent space at 256 px: ViT-L/14, SD's VAE, a 1 B prior, an 870 M U-Net; needs GPUs",
        shard=ShardConfig(samples_per_shard=10_000, image_size=256),
        clip=ClipConfig(pretrained="ViT-L-14/openai"),
        vae=VaeConfig(pretrained="stabilityai/sd-vae-ft-mse"),
        prior=PriorConfig(
            num_layers=20,
            num_attention_heads=32,
            attention_head_dim=64,
            max_steps=600_000,
            batch_size=4096,
            learning_rate=1.1e-4,
            warmup_steps=5_000,
            schedule="constant",
            weight_decay=6e-2,
            ema_decay=0.9999,
            precision="bf16",
            num_workers=8,
            fsdp=True,
            checkpoint_every=2_000,
        ),
        denoiser=DenoiserConfig(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            num_attention_heads=(5, 10, 20, 20),
            norm_num_groups=32,
            prediction_type="v_prediction",
            max_steps=800_000,
            batch_size=2048,
            learning_rate=1.2e-4,
            warmup_steps=10_000,
            schedule="constant",
            weight_decay=1e-2,
            ema_decay=0.9999,
            precision="bf16",
            num_workers=8,
            fsdp=True,
            checkpoint_every=2_000,
        ),
        evaluate=EvaluationConfig(num_images=30_000),
    )


def prepare() -> Recipe:
    """Preprocessing alone: shards, and a column for each encoder that is given."""
    return Recipe(name="prepare", summary="shards, and a column for each encoder given; no training")


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "unclip": unclip}
"""What `darkroom run` knows."""


def find(name: str) -> Recipe:
    """The recipe `name`; raises UserError naming the nearest one."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"there is no recipe {name!r}; {hint}there are {', '.join(RECIPES)}")
    return RECIPES[name]()


def edited(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """`recipe` with each `PATH=VALUE` applied, typed by its own fields; raises UserError saying what would be valid."""
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(
                f"--set {assignment!r} has no '=': write PATH=VALUE, such as denoiser.max_steps=500"
            )
        recipe = _assigned(recipe, path.strip(), text.strip())
    return recipe


def with_data(recipe: Recipe, source: str) -> Recipe:
    """`recipe` on the user's own pairs at `source`: a local path is made absolute."""
    path = source if "://" in source else str(Path(source).expanduser().resolve())
    return recipe.model_copy(
        update={"source": recipe.source.model_copy(update={"kind": "auto", "path": path})}
    )


def paths(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every path that `--set` accepts, with its field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= paths(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def _assigned(recipe: Recipe, path: str, text: str) -> Recipe:
    known = {p: field for p, field in paths().items() if p not in ("name", "summary")}
    if path not in known:
        near = difflib.get_close_matches(path, known, 3, cutoff=0.5) or sorted(
            p for p in known if p.startswith(path.split(".")[0] + ".")
        )
        hint = (
            f"; did you mean {' or '.join(near[:3])}?"
            if near
            else "; its sections are " + ", ".join(sorted({p.split(".")[0] for p in known}))
        )
        raise UnknownPath(f"--set {path}: the recipe has no such path{hint}")
    document = recipe.model_dump(mode="json")
    *sections, leaf = path.split(".")
    target = document
    for section in sections:
        target = target[section]
    target[leaf] = _value(text)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        meaning = known[path].description or ""
        raise UserError(
            f"--set {path}={text}: {_sentence(first)}{f' ({meaning})' if meaning else ''}"
        ) from error


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def _sentence(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]
