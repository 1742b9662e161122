"""Named runs as functions: a recipe is a frozen config of a whole system, edited by typed `--set` paths (`assignments.py`)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from data.config import Config, listed, operational
from data.errors import UserError
from data.shards import ShardConfig
from data.sources import SourceConfig
from data.urls import refuse_credentials
from flows.protocols import PROTOCOLS
from stages.contract import FanoutConfig, JobsConfig
from stages.embed import EmbedConfig
from stages.encode import EncodeConfig
from stages.evaluate import EvaluateConfig
from stages.generate import GenerateConfig
from stages.spending import PricesConfig
from stages.text import TextConfig
from training.metrics import gates
from training.metrics.catalogue import METRICS
from training.metrics.extractors import WEIGHTS, weights_of
from training.systems.clip import ClipConfig
from training.systems.denoiser import DenoiserConfig
from training.systems.prior import PriorConfig
from training.systems.vae import VaeConfig
from training.t5_encoder import T5Config


class EvaluationConfig(GenerateConfig, EvaluateConfig):
    """What is generated for evaluation, what is measured of it, and what it must reach."""

    protocol: str | None = Field(
        None, description=f"a built-in protocol, which fixes settings of this section: {', '.join(PROTOCOLS)}"
    )
    gates: tuple[str, ...] = Field(
        (),
        description="conditions by 95 % interval: 'METRIC <= NUMBER', 'METRIC >= NUMBER', 'not worse than RUN'; a run that fails one exits 1",
    )

    @field_validator("protocol")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in PROTOCOLS:
            raise ValueError(f"there is no protocol {value!r}; there are {', '.join(PROTOCOLS)}")
        return value

    @model_validator(mode="after")
    def _as_fixed(self) -> Self:
        fixed = PROTOCOLS[self.protocol].fixes if self.protocol else {}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"evaluate.protocol={self.protocol} fixes evaluate.{name} at {value}, not {getattr(self, name)}; "
                    "leave one of the two out"
                )
        return self

    _listed_gates = field_validator("gates", mode="before")(listed)

    @field_validator("gates")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(gates.parsed(text).text for text in value)

    @model_validator(mode="after")
    def _judged_by_what_is_measured(self) -> Self:
        for gate in map(gates.parsed, self.gates):
            if not isinstance(gate, gates.Bound) or gate.metric in self.chosen:
                continue
            metric = METRICS.get(gate.metric)
            needed = metric.extractor if metric else "inception" if gate.metric == "vae_rfid" else "clip"
            kind = weights_of(needed)
            if kind not in (*self.weights, "clip"):
                raise ValueError(
                    f"gate {gate.text!r}: {gate.metric} is measured with evaluate.{kind} alone: {WEIGHTS[kind]}"
                )
            if metric:
                raise ValueError(
                    f"gate {gate.text!r}: {gate.metric} is measured where evaluate.metrics={gate.metric} asks for it"
                )
        return self


class Workers(Config):
    """What one stage is given, where that is something else than `fanout` says for all."""

    num_workers: int | None = operational(None, ge=1, description="actors of this stage; None: as for all")


class Share(Workers):
    """The same of a stage that runs networks."""

    num_gpus: float | None = operational(None, ge=0, description="GPUs per actor; None: as for all")


class SharedFanout(FanoutConfig):
    """How shards are spread over workers: for all stages, and for each by itself."""

    shard: Workers = operational(Workers())
    embed: Share = operational(Share())
    text: Share = operational(Share())
    encode: Share = operational(Share())
    generate: Share = operational(Share())
    evaluate: Share = operational(Share())

    def of(self, stage: str) -> FanoutConfig:
        """What `stage` runs with."""
        for_all = self.model_dump(include=set(FanoutConfig.model_fields))
        own = getattr(self, stage, Workers()).model_dump(exclude_none=True)
        return FanoutConfig.model_validate(for_all | own)


class Recipe(Config):
    """An unCLIP run: its source, its encoders, its prior and denoiser, its evaluation."""

    name: str = Field(description="what the run is called")
    summary: str = operational("", description="one line for `darkroom recipes`")
    seed: int = Field(0, ge=0, description="added to every training stage's own seed, and to generation's")
    source: SourceConfig = SourceConfig()
    shard: ShardConfig = ShardConfig()
    fanout: SharedFanout = SharedFanout()
    jobs: JobsConfig = JobsConfig()
    clip: ClipConfig = ClipConfig()
    embed: EmbedConfig = EmbedConfig()
    t5: T5Config = T5Config()
    text: TextConfig = TextConfig()
    vae: VaeConfig = VaeConfig()
    encode: EncodeConfig = EncodeConfig()
    prior: PriorConfig = PriorConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    evaluate: EvaluationConfig = EvaluationConfig()
    prices: PricesConfig = PricesConfig()
    expected_seconds: dict[str, float] = operational(
        {},
        description="measured wall time per stage on two CPU cores, until this root has timings of its own",
    )

    @model_validator(mode="after")
    def _without_credentials(self) -> Self:
        refuse_credentials("", self.model_dump(mode="json"))
        return self


EXPECTED_SECONDS = {
    "shard": 9.0,
    "clip": 99.0,
    "embed": 10.0,
    "vae": 100.0,
    "encode": 13.0,
    "prior": 48.0,
    "denoiser": 268.0,
    "generate": 18.0,
    "evaluate": 8.0,
    "report": 1.0,
}
"""Wall time of the demo's stages, measured on two cores of a CPU with AVX-512; a root's own timings replace them."""


def demo() -> Recipe:
    """Everything tiny: from 6,000 drawn scenes to an evaluated system in minutes on two CPU cores."""
    return Recipe(
        name="demo",
        summary="a complete unCLIP system on 32 px shapes (or your own pictures) in minutes, no GPU, no network",
        source=SourceConfig(kind="shapes"),
        shard=ShardConfig(samples_per_shard=1000, image_size=32, encode_format="png"),
        clip=ClipConfig(
            vision_patch_size=8,
            vision_width=64,
            vision_layers=3,
            text_layers=2,
            context_length=24,
            max_shift=0,
            max_steps=700,
            validate_every=350,
            batch_size=128,
            learning_rate=1.5e-3,
            warmup_steps=30,
            ema_decay=0.99,
        ),
        vae=VaeConfig(
            latent_channels=8,
            block_out_channels=(16, 32, 32),
            norm_num_groups=2,
            l1_weight=0.0,
            mse_weight=4.0,
            kl_weight=1e-5,
            max_steps=1000,
            validate_every=500,
            batch_size=16,
            learning_rate=2e-3,
            adam_beta2=0.95,
            warmup_steps=40,
            ema_decay=0.995,
        ),
        prior=PriorConfig(
            max_steps=160, validate_every=80, batch_size=128, learning_rate=1e-3, ema_decay=0.99
        ),
        denoiser=DenoiserConfig(
            block_out_channels=(64, 128),
            attention_levels=(False, True),
            logit_mean=1.0,
            logit_std=1.3,
            max_noise_level=250,
            max_steps=1200,
            validate_every=600,
            batch_size=32,
            learning_rate=1.2e-3,
            adam_beta2=0.95,
            warmup_steps=50,
            ema_decay=0.995,
        ),
        evaluate=EvaluationConfig(
            num_images=450, guidance_scale=2.0, num_inference_steps=12, noise_level=100
        ),
        expected_seconds=EXPECTED_SECONDS,
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
            validate_every=2_000,
            validation_samples=4_096,
            on_spike="rollback",
            spike_factor=10,
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
            activation_checkpointing=True,
            num_workers=8,
            fsdp=True,
            checkpoint_every=2_000,
            validate_every=2_000,
            validation_samples=4_096,
            on_spike="rollback",
            spike_factor=10,
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


def with_data(recipe: Recipe, source: str) -> Recipe:
    """`recipe` on the user's own pairs at `source`: a local path is made absolute."""
    if not source:
        raise UserError("the source is empty: name a folder or a table of image-text pairs")
    try:
        path = source if "://" in source else str(Path(source).expanduser().resolve())
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a link to itself, an unknown home folder, a zero byte
        raise UserError(
            f"{source!r} leads nowhere ({error}): name a folder or a table of image-text pairs"
        ) from error
    refuse_credentials("the source", path)
    return recipe.model_copy(
        update={"source": recipe.source.model_copy(update={"kind": "auto", "path": path})}
    )
