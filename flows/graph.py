"""A recipe as a graph of stages: which stage, with which config, reads which artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.checksums import checksum_of
from data.config import Config
from data.errors import UserError
from data.manifest import START
from data.sources import describe
from flows.protocols import PROTOCOLS
from flows.recipes import Recipe
from stages import train
from stages.catalogue import STAGES
from stages.contract import InputRef, Stage
from stages.evaluate import EvaluateConfig
from stages.generate import GenerateConfig
from stages.prompts import listed_prompts
from stages.report import BASELINE, ReportConfig
from stages.shard import ShardStageConfig
from training.encoders import weights_digest
from training.metrics.extractors import place_of
from training.metrics.references import inception_statistics
from training.systems.system import TrainConfig


@dataclass(frozen=True)
class Node:
    """One stage of a plan. Inputs are other nodes by name, or weights made elsewhere."""

    stage: Stage
    config: Config
    inputs: Mapping[str, str | InputRef]
    identities: np.ndarray | None = field(default=None, compare=False, repr=False)
    """Of a listed source, `sources.row_identities`; the stage that reads one grows with it."""
    rows: int | None = field(default=None, compare=False)
    """Of the source, for the stage that reads one: there will be no more samples than that."""

    @property
    def name(self) -> str:
        """The stage's name: what the plan and `--only` call it."""
        return self.stage.name


def unclip_nodes(
    recipe: Recipe,
    *,
    retry_failed: bool = False,
    baselines: Mapping[str, InputRef] | None = None,
    made: Mapping[str, InputRef] | None = None,
    start: Mapping[str, InputRef] | None = None,
) -> list[Node]:
    """The main recipe in an order that respects its inputs; a `pretrained` encoder takes its training stage's place.

    `retry_failed`: rows that failed for a reason that may pass are attempted again, in new shards. `baselines`: the
    evaluation of every run that a gate names. `made`: artifacts that take the place of training stages. `start`: the prior or
    denoiser whose weights that training begins with.
    """
    _refuse_misfits(recipe)
    made, start = made or {}, start or {}
    clip, vae = (made.get(kind) or _encoder(recipe, kind) for kind in ("clip", "vae"))
    generation = recipe.evaluate.model_dump(include=set(GenerateConfig.model_fields))
    generation["seed"] += recipe.seed
    generation["prompts_digest"] = _prompts_digest(recipe)
    if recipe.evaluate.prompts and "://" not in recipe.evaluate.prompts:
        generation["prompts"] = str(Path(recipe.evaluate.prompts).expanduser().resolve())
    measuring = recipe.evaluate.model_dump(include=set(EvaluateConfig.model_fields))
    system = {
        "data": "shard",
        "embed": "embed",
        "clip": clip,
        "vae": vae,
        "prior": made.get("prior", "prior"),
        "denoiser": made.get("denoiser", "denoiser"),
    }
    data = {
        "prior": {"data": "shard", "embed": "embed"},
        "denoiser": {"data": "shard", "embed": "embed", "encode": "encode"},
    }
    nodes = [
        _shard(recipe, retry_failed),
        *([_training(recipe, "clip", {"data": "shard"})] if clip == "clip" else []),
        Node(STAGES["embed"], recipe.embed, {"data": "shard", "clip": clip}),
        *([_training(recipe, "vae", {"data": "shard"})] if vae == "vae" else []),
        Node(STAGES["encode"], recipe.encode, {"data": "shard", "vae": vae}),
        *(
            _training(recipe, name, data[name] | ({START: start[name]} if name in start else {}))
            for name in ("prior", "denoiser")
            if name not in made
        ),
        Node(STAGES["generate"], GenerateConfig.model_validate(generation), system),
        Node(
            STAGES["evaluate"], EvaluateConfig.model_validate(measuring), {**system, "generate": "generate"}
        ),
    ]
    everything: dict[str, str | InputRef] = {("data" if n.name == "shard" else n.name): n.name for n in nodes}
    everything |= {f"{BASELINE}{run}": ref for run, ref in (baselines or {}).items()}
    nodes.append(Node(STAGES["report"], ReportConfig(gates=recipe.evaluate.gates), everything))
    check_columns(nodes)
    return nodes


def prepare_nodes(recipe: Recipe, *, retry_failed: bool = False) -> list[Node]:
    """Shards alone, and a column for each encoder given by `clip.pretrained`, `t5.pretrained` and `vae.pretrained`."""
    _refuse_buckets(recipe)
    nodes = [_shard(recipe, retry_failed)]
    if recipe.clip.pretrained:
        nodes.append(Node(STAGES["embed"], recipe.embed, {"data": "shard", "clip": _encoder(recipe, "clip")}))
    if recipe.t5.pretrained:
        nodes.append(Node(STAGES["text"], recipe.text, {"data": "shard", "t5": _encoder(recipe, "t5")}))
    if recipe.vae.pretrained:
        nodes.append(Node(STAGES["encode"], recipe.encode, {"data": "shard", "vae": _encoder(recipe, "vae")}))
    check_columns(nodes)
    return nodes


def check_columns(nodes: list[Node]) -> None:
    """Raises UserError when a stage reads a column that no stage before it writes."""
    written: set[str] = set()
    for node in nodes:
        if missing := node.stage.reads(node.config) - written:
            raise UserError(
                f"stage {node.name} reads {', '.join(sorted(missing))}, which no earlier stage writes"
            )
        written |= node.stage.writes(node.config)


def refuse_too_few(nodes: Sequence[Node], source: Node) -> None:
    """Raises UserError where a training of `nodes` could not fill a batch even if each row of `source` became a sample."""
    for node in nodes:
        if source.rows is not None and isinstance(node.config, TrainConfig):
            train.refuse_too_few(node.name, node.config, source.rows)


def _shard(recipe: Recipe, retry_failed: bool) -> Node:
    source = describe(recipe.source)
    config = ShardStageConfig(
        source=recipe.source, source_digest=source.digest, shard=recipe.shard, retry_failed=retry_failed
    )
    return Node(STAGES["shard"], config, {}, source.identities, source.rows)


def _training(recipe: Recipe, name: str, inputs: Mapping[str, str | InputRef]) -> Node:
    config = getattr(recipe, name)
    train.refuse(name, config)
    return Node(STAGES[name], config.model_copy(update={"seed": config.seed + recipe.seed}), inputs)


def _refuse_buckets(recipe: Recipe) -> None:
    if recipe.vae.pretrained and recipe.shard.resize == "bucket":
        raise UserError(
            "shard.resize=bucket: the latents of a shard need pictures of one size; set shard.resize to center_crop or border, "
            "or leave vae.pretrained out"
        )


def _refuse_misfits(recipe: Recipe) -> None:
    """Raises UserError for what a late stage would refuse after hours of work, and for what no stage would read."""
    if recipe.t5.pretrained:
        raise UserError(
            f"t5.pretrained={recipe.t5.pretrained}: no part of {recipe.name} reads T5's states; leave it out, or make them "
            "by `darkroom prepare`"
        )
    clip, vae, shard = recipe.clip, recipe.vae, recipe.shard
    factor = 2 ** (len(vae.block_out_channels) - 1)
    is_square = shard.resize in ("center_crop", "border")
    if not vae.pretrained and (not is_square or shard.image_size % factor):
        raise UserError(
            f"shard.image_size={shard.image_size} with shard.resize={shard.resize}: a VAE of {factor}-fold reduction needs "
            f"squares whose side is a multiple of {factor}; set shard.image_size or vae.block_out_channels"
        )
    _refuse_buckets(recipe)
    if not clip.pretrained and clip.text_width != clip.embed_dim:
        raise UserError(
            f"clip.text_width={clip.text_width} and clip.embed_dim={clip.embed_dim}: the prior needs them equal; set both"
        )
    _refuse_unmeasurable(recipe)


def _refuse_unmeasurable(recipe: Recipe) -> None:
    """Raises UserError where an evaluation would find its weights, its statistics or what its protocol needs missing."""
    shard, weights = recipe.shard, recipe.evaluate.weights
    for kind, (place, _) in weights.items():
        try:
            place_of(kind, place)
        except UserError as error:
            raise UserError(f"evaluate.{kind}={place}: {error}, or null for none of its metrics") from error
    if recipe.evaluate.reference:
        if "inception" not in weights:
            raise UserError(
                "evaluate.reference holds Inception's statistics of real images: give evaluate.inception too"
            )
        inception_statistics(recipe.evaluate.reference, weights["inception"][0])
    if not recipe.evaluate.protocol:
        return
    name, protocol = recipe.evaluate.protocol, PROTOCOLS[recipe.evaluate.protocol]
    if protocol.image_size not in (None, shard.image_size):
        raise UserError(
            f"evaluate.protocol={name} is defined at {protocol.image_size} px: set shard.image_size={protocol.image_size}, "
            f"not {shard.image_size}"
        )
    for path, what in protocol.needs.items():
        if not getattr(recipe.evaluate, path):
            raise UserError(f"evaluate.protocol={name} needs evaluate.{path}: {what}")


def _prompts_digest(recipe: Recipe) -> str:
    """SHA-256 of the prompt manifest; raises UserError when it is missing, another than asked for, or has too few prompts."""
    path, wanted = recipe.evaluate.prompts, recipe.evaluate.prompts_digest
    if path is None:
        return ""
    count, needed = len(listed_prompts(path)), recipe.evaluate.num_prompts
    if count < needed:
        raise UserError(
            f"evaluate.prompts={path} has {count:,} prompts, and evaluate.num_images={recipe.evaluate.num_images} with "
            f"{recipe.evaluate.images_per_prompt} per prompt needs {needed:,}: give more prompts or fewer images"
        )
    found = checksum_of(path).sha256
    if wanted and wanted != found:
        raise UserError(
            f"evaluate.prompts={path} has SHA-256 {found}, not {wanted} (evaluate.prompts_digest): it is another list"
        )
    return found


def _encoder(recipe: Recipe, kind: str) -> str | InputRef:
    source = getattr(recipe, kind).pretrained
    if source is None:
        return kind
    source = source.removeprefix("hub:")
    place = Path(source.removeprefix("file://")).expanduser()
    if place.is_dir():
        source = str(place.resolve())  # workers and later commands may stand in another folder
    elif source.startswith((".", "/", "~", "file://")):
        raise UserError(
            f"{kind}.pretrained={source} does not exist: give the folder of a {kind} stage, or a hub name"
        )
    return InputRef(stage=kind, folder=source, fingerprint=weights_digest(kind, source), external=True)
