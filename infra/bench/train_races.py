"""The races of `train_peers.py`: a script of a peer on networks and pictures of some size, and our training of the same.

A race with no divisors has the published sizes; one with divisors has the same networks with their widths, layers and the
sides of their pictures divided.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from train_networks import (
    BIGG,
    TOKENS,
    VIT_L,
    ClipSizes,
    Dalle2Prior,
    Unet,
    dalle2_prior,
    gflops,
    image_gflops,
    image_unet,
    kandinsky_prior,
    latent_gflops,
    movq,
    prior_sizes,
    sd_vae,
    text_gflops,
    text_unet,
)

from training.diffusion.objective import SCALED_LINEAR_BETAS, Objective
from training.systems import prior
from training.systems.system import Columns, TrainConfig

LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY, CLIP_GRAD_NORM = 1e-4, 1e-2, 0.9999, 1.0
UNENDING = 100_000
"""Steps that nobody reaches: whoever is timed is ended by the clock."""


@dataclass(frozen=True)
class Divisors:
    """What the published sizes are divided by."""

    width: int = 1
    layers: int = 1
    side: int = 1


@dataclass(frozen=True)
class Race(ABC):
    """What all races share: pictures, a CLIP, perhaps an autoencoder, and a script of diffusers."""

    by: Divisors
    batch_size: int
    title: ClassVar[str]
    peer: ClassVar[str] = "diffusers"
    script: ClassVar[str]
    published_side: ClassVar[int]
    """Of the pictures, in px: what the script takes by default."""

    @property
    def side(self) -> int:
        """Of the pictures, in px."""
        return self.published_side // self.by.side

    @property
    def samples(self) -> int:
        """Of the dataset: batches are whole, of the four fifths too that DALLE2-pytorch trains on."""
        return 10 * self.batch_size

    @property
    def latent(self) -> int:
        """Side of a latent."""
        return self.side // 8

    @abstractmethod
    def clip(self) -> ClipSizes:
        """The CLIP, as far as somebody runs it."""

    def autoencoder(self) -> nn.Module | None:
        """The autoencoder, where there is one."""
        return None

    @abstractmethod
    def write_models(self, folder: Path) -> None:
        """Writes under `folder`, which has clip and vae, what else the peer loads."""

    @abstractmethod
    def arguments(self, folder: Path) -> list[str]:
        """The peer's command line."""

    def config(self) -> TrainConfig:
        """Our training's settings."""
        return TrainConfig(**self._settings())

    @abstractmethod
    def trainable(self, columns: Columns) -> Any:
        """Our training's network and loss."""

    @abstractmethod
    def network_gflops(self) -> float:
        """Of one sample's forward and backward pass."""

    @abstractmethod
    def encoder_gflops(self) -> float:
        """Of encoding one sample as the peer does in every step."""

    def _settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "clip_grad_norm": CLIP_GRAD_NORM,
            "ema_decay": EMA_DECAY,
            "schedule": "constant",
            "warmup_steps": 0,
            "max_steps": UNENDING,
            "checkpoint_every": UNENDING,
        }

    def _diffusers_arguments(self, folder: Path, **more: Any) -> list[str]:
        settings = {
            "train_data_dir": folder / "pictures",
            "resolution": self.side,
            "train_batch_size": self.batch_size,
            "max_train_steps": UNENDING,
            "learning_rate": LEARNING_RATE,
            "adam_weight_decay": WEIGHT_DECAY,
            "max_grad_norm": CLIP_GRAD_NORM,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "mixed_precision": "no",
            "seed": 0,
            "checkpointing_steps": UNENDING,
            "output_dir": folder / "peer",
            "cache_dir": folder / "cache",
            **more,
        }
        return ["--use_ema", *[f"--{name}={value}" for name, value in settings.items()]]


class KandinskyPrior(Race):
    """Our own prior in Kandinsky's size; the peer loads what our code builds."""

    title = "Kandinsky 2.2's prior"
    script = "examples/kandinsky2_2/text_to_image/train_text_to_image_prior.py"
    published_side = 224

    def clip(self) -> ClipSizes:
        return BIGG.divided(self.by.width, self.by.layers, self.by.side)

    def write_models(self, folder: Path) -> None:
        network = self._network()
        nn.init.ones_(network.clip_std)  # a fresh one has zeros, by which the peer divides
        network.save_pretrained(folder / "prior" / "prior")
        links(folder / "prior", "image_encoder", "text_encoder", "image_processor", "tokenizer")

    def arguments(self, folder: Path) -> list[str]:
        place = {"pretrained_prior_model_name_or_path": folder / "prior"}
        return self._diffusers_arguments(folder, caption_column="text", **place)

    def config(self) -> TrainConfig:
        return prior.PriorConfig(**prior_sizes(self.by.width, self.by.layers), **self._settings())

    def trainable(self, columns: Columns) -> Any:
        return prior.fit(self.config(), columns)  # type: ignore[arg-type]

    def network_gflops(self) -> float:
        one, many = (1, self.clip().embed_dim), (1, TOKENS, self.clip().embed_dim)
        e = torch.empty
        return gflops(
            self._network, lambda m: m(e(one), e(1), e(one), e(many), return_dict=False)[0], backward=True
        )

    def encoder_gflops(self) -> float:
        return image_gflops(self.clip()) + text_gflops(self.clip())

    def _network(self) -> Any:
        return kandinsky_prior(self.by.width, self.by.layers)


class KandinskyDecoder(Race):
    """Kandinsky's U-Net, conditioned by an image embedding alone."""

    title = "Kandinsky 2.2's U-Net"
    script = "examples/kandinsky2_2/text_to_image/train_text_to_image_decoder.py"
    published_side = 512

    def clip(self) -> ClipSizes:
        return BIGG.divided(self.by.width, self.by.layers, self.by.side)

    def autoencoder(self) -> nn.Module:
        return movq(self.by.width)

    def write_models(self, folder: Path) -> None:
        from diffusers import DDPMScheduler

        image_unet(self.by.width).save_pretrained(folder / "decoder" / "unet")
        DDPMScheduler(beta_schedule="linear").save_pretrained(folder / "decoder" / "scheduler")
        links(folder / "decoder", movq="vae")
        links(folder / "prior", "image_encoder", "image_processor")

    def arguments(self, folder: Path) -> list[str]:
        places = {f"pretrained_{name}_model_name_or_path": folder / name for name in ("prior", "decoder")}
        return self._diffusers_arguments(folder, **places)

    def trainable(self, columns: Columns) -> Any:
        scale = columns.facts("vae_moments")["scaling_factor"]
        return Unet(partial(image_unet, self.by.width), "img_emb", scale, Objective("epsilon", "linear"))

    def network_gflops(self) -> float:
        latents = (1, 4, self.latent, self.latent)
        condition = {"image_embeds": torch.empty(1, self.clip().embed_dim, device="meta")}
        return gflops(
            partial(image_unet, self.by.width),
            lambda m: m(
                torch.empty(latents), torch.zeros(1), None, added_cond_kwargs=condition, return_dict=False
            )[0],
            backward=True,
        )

    def encoder_gflops(self) -> float:
        return image_gflops(self.clip()) + latent_gflops(self.autoencoder, self.side)


class StableDiffusion(Race):
    """Stable Diffusion 1's U-Net, conditioned by the text alone."""

    title = "Stable Diffusion 1's U-Net"
    script = "examples/text_to_image/train_text_to_image.py"
    published_side = 512

    def clip(self) -> ClipSizes:
        return VIT_L.divided(self.by.width, self.by.layers).without_vision()

    def autoencoder(self) -> nn.Module:
        return sd_vae(self.by.width)

    def write_models(self, folder: Path) -> None:
        from diffusers import DDPMScheduler

        text_unet(self.by.width).save_pretrained(folder / "model" / "unet")
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", **SCALED_LINEAR_BETAS)
        scheduler.save_pretrained(folder / "model" / "scheduler")
        links(folder / "model", "text_encoder", "tokenizer", vae="vae")

    def arguments(self, folder: Path) -> list[str]:
        named = {"pretrained_model_name_or_path": folder / "model", "image_column": "image"}
        return ["--center_crop", *self._diffusers_arguments(folder, caption_column="text", **named)]

    def trainable(self, columns: Columns) -> Any:
        scale = columns.facts("vae_moments")["scaling_factor"]
        objective = Objective("epsilon", "scaled_linear")
        return Unet(partial(text_unet, self.by.width), "text_hidden", scale, objective)

    def network_gflops(self) -> float:
        latents, states = (1, 4, self.latent, self.latent), (1, TOKENS, self.clip().text.width)
        e = torch.empty
        return gflops(
            partial(text_unet, self.by.width),
            lambda m: m(e(latents), torch.zeros(1), e(states), return_dict=False)[0],
            backward=True,
        )

    def encoder_gflops(self) -> float:
        return text_gflops(self.clip()) + latent_gflops(self.autoencoder, self.side)


@dataclass(frozen=True)
class Dalle2(Race):
    """DALLE2-pytorch's own prior: its script reads stored image embeddings and encodes the captions in every step."""

    title = "DALLE2-pytorch's prior"
    peer = "dalle2"
    script = "train_diffusion_prior.py"
    published_side = 224
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "image_size": 224,
            "timesteps": 1000,
            "sample_timesteps": 64,
            "cond_drop_prob": 0.1,
            "loss_type": "l2",
            "predict_x_start": True,
            "beta_schedule": "cosine",
            "condition_on_text_encodings": True,
        }
    )

    def clip(self) -> ClipSizes:
        return VIT_L.divided(self.by.width, self.by.layers).without_vision()

    def write_models(self, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = folder / "clip.pt"  # open_clip's names of weights are OpenAI's, which the peer reads
        torch.save(load_file(folder / "clip" / "open_clip_model.safetensors"), weights)
        network = {"net": self._net(), "image_embed_dim": self.clip().embed_dim, **self.settings}
        config = {
            "prior": {"clip": {"make": "openai", "model": str(weights)}, **network},
            "data": self._data(folder),
            "train": {
                "epochs": UNENDING,
                "lr": LEARNING_RATE,
                "wd": WEIGHT_DECAY,
                "max_grad_norm": CLIP_GRAD_NORM,
                "ema_beta": EMA_DECAY,
            },
            "tracker": {
                "data_path": str(folder / "peer"),
                "overwrite_data_path": True,
                "log": {"log_type": "console"},
                "save": {"save_to": "local", "save_latest_to": "latest.pth", "save_best_to": "best.pth"},
            },
        }
        (folder / "dalle2.json").write_text(json.dumps(config))

    def arguments(self, folder: Path) -> list[str]:
        return [f"--config_file={folder / 'dalle2.json'}"]

    def trainable(self, columns: Columns) -> Any:  # noqa: ARG002
        return Dalle2Prior(self._network)

    def network_gflops(self) -> float:
        one, many = (1, self.clip().embed_dim), (1, TOKENS, self.clip().embed_dim)
        e = torch.empty
        return gflops(
            self._network,
            lambda m: m(image_embed=e(one), text_embed=e(one), text_encodings=e(many)),
            backward=True,
        )

    def encoder_gflops(self) -> float:
        return text_gflops(self.clip())

    def _network(self) -> nn.Module:
        return dalle2_prior(self.clip().embed_dim, self._net(), self.settings)

    def _net(self) -> dict[str, Any]:
        return {
            "dim": self.clip().embed_dim,
            "depth": 12 // self.by.layers,
            "num_timesteps": 1000,
            "max_text_len": TOKENS,
            "dim_head": 64,
            "heads": 12 // self.by.width,
            "attn_dropout": 0.05,
            "ff_dropout": 0.05,
            "normformer": True,
        }

    def _data(self, folder: Path) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_data_points": UNENDING,
            "eval_every_seconds": UNENDING,
            "image_url": str(folder / "peer_emb"),
            "meta_url": str(folder / "embed" / "metadata"),
            "splits": {"train": 0.8, "val": 0.1, "test": 0.1},
        }


def links(folder: Path, *of_clip: str, **names: str) -> None:
    """Sub-folders that are others: one CLIP serves as tokenizer, text encoder and image encoder."""
    folder.mkdir(exist_ok=True)
    for name, target in {**dict.fromkeys(of_clip, "clip"), **names}.items():
        (folder / name).symlink_to(f"../{target}")


RACES: dict[str, Race] = {
    "prior": KandinskyPrior(Divisors(width=4, layers=4), batch_size=32),
    "decoder": KandinskyDecoder(Divisors(width=2, side=2), batch_size=4),
    "text": StableDiffusion(Divisors(width=2, side=2), batch_size=4),
    "dalle2": Dalle2(Divisors(), batch_size=16),
}
TINY: dict[str, Race] = {
    "prior": KandinskyPrior(Divisors(width=16, layers=4), batch_size=4),
    "decoder": KandinskyDecoder(Divisors(width=4, layers=16, side=8), batch_size=2),
    "text": StableDiffusion(Divisors(width=4, layers=4, side=8), batch_size=2),
    "dalle2": Dalle2(Divisors(width=4, layers=4), batch_size=8),
}
"""The same races at sizes that show that the script works and nothing else."""
