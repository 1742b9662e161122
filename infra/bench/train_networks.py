"""The networks of `train_peers.py`: their published sizes, the same divided, and how our loop trains the two U-Nets.

Legend: B batch, D embedding width, T tokens, C latent channels, h w latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.diffusion.objective import Objective, per_sample_mse
from training.randomness import Draws
from training.systems.system import Batch

TOKENS = 77


@dataclass(frozen=True)
class Tower:
    """A transformer."""

    width: int
    layers: int
    heads: int
    mlp: int

    def divided(self, width: int, layers: int) -> Tower:
        """Heads of the same width, so many times fewer of them."""
        return Tower(self.width // width, self.layers // layers, self.heads // width, self.mlp // width)

    def settings(self) -> dict[str, Any]:
        """As transformers' CLIP configs call them."""
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp,
        }


NO_VISION = Tower(64, 1, 1, 64)


@dataclass(frozen=True)
class ClipSizes:
    """A CLIP with patches of 14 px."""

    vision: Tower
    text: Tower
    embed_dim: int
    activation: str
    side: int = 224

    def divided(self, width: int, layers: int = 1, side: int = 1) -> ClipSizes:
        """Widths, layers and the side of the pictures, each divided."""
        towers = self.vision.divided(width, layers), self.text.divided(width, layers)
        return ClipSizes(*towers, self.embed_dim // width, self.activation, self.side // side)

    def without_vision(self) -> ClipSizes:
        """The same with the smallest vision tower: where nobody runs it."""
        return replace(self, vision=NO_VISION)

    def build(self) -> nn.Module:
        """transformers' `CLIPModel` with random weights."""
        from transformers import CLIPConfig, CLIPModel

        every = {"projection_dim": self.embed_dim, "hidden_act": self.activation}
        vision = {**self.vision.settings(), **every, "patch_size": 14, "image_size": self.side}
        config = CLIPConfig(
            text_config={**self.text.settings(), **every, "eos_token_id": 49407},
            vision_config=vision,
            projection_dim=self.embed_dim,
        )
        return CLIPModel(config)


BIGG = ClipSizes(Tower(1664, 48, 16, 8192), Tower(1280, 32, 20, 5120), 1280, "gelu")
"""Kandinsky 2.2's."""
VIT_L = ClipSizes(Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072), 768, "quick_gelu")
"""Stable Diffusion 1's, and DALLE2-pytorch's by its example."""


def prior_sizes(width: int, layers: int) -> dict[str, int]:
    """Kandinsky 2.2's prior, as `PriorConfig` calls its sizes, divided."""
    return {"num_layers": 20 // layers, "num_attention_heads": 32 // width, "attention_head_dim": 64}


def kandinsky_prior(width: int, layers: int) -> Any:
    """The same as `training.systems.prior` builds it."""
    from diffusers import PriorTransformer

    return PriorTransformer(
        **prior_sizes(width, layers),
        embedding_dim=BIGG.embed_dim // width,
        num_embeddings=TOKENS,
        embedding_proj_norm_type="layer",
    )


def image_unet(width: int) -> nn.Module:
    """Kandinsky 2.2's U-Net, which knows an image embedding and no text; its heads are divided in width."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        block_out_channels=_divided(width, 384, 768, 1152, 1536),
        layers_per_block=3,
        attention_head_dim=64 // width,
        cross_attention_dim=768 // width,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=BIGG.embed_dim // width,
        resnet_time_scale_shift="scale_shift",
    )


def movq(width: int) -> nn.Module:
    """Kandinsky 2.2's autoencoder."""
    from diffusers import VQModel

    return VQModel(
        block_out_channels=_divided(width, 128, 256, 256, 512),
        down_block_types=(*["DownEncoderBlock2D"] * 3, "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 3),
        layers_per_block=2,
        latent_channels=4,
        num_vq_embeddings=16384,
        vq_embed_dim=4,
        norm_type="spatial",
        scaling_factor=1.0,
    )


def text_unet(width: int) -> nn.Module:
    """Stable Diffusion 1's U-Net, which knows the text alone; its heads are divided in width."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=_divided(width, 320, 640, 1280, 1280),
        cross_attention_dim=768 // width,
        attention_head_dim=8,  # diffusers' U-Net reads a number of heads here
        norm_num_groups=math.gcd(32, 320 // width),
    )


def sd_vae(width: int) -> nn.Module:
    """Stable Diffusion 1's autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=_divided(width, 128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def dalle2_prior(dim: int, net: Mapping[str, Any], settings: Mapping[str, Any]) -> nn.Module:
    """DALLE2-pytorch's prior without its CLIP."""
    from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

    return DiffusionPrior(DiffusionPriorNetwork(**net), image_embed_dim=dim, **settings)


def _divided(width: int, *channels: int) -> tuple[int, ...]:
    return tuple(count // width for count in channels)


@dataclass(frozen=True)
class Unet:
    """What our loop knows of a U-Net that predicts the noise of stored latents: the mathematics of the peer's script."""

    make: Callable[[], nn.Module]
    condition: str
    """The column that the network is given: img_emb or text_hidden."""
    scaling_factor: float
    objective: Objective

    @property
    def columns(self) -> tuple[str, ...]:
        return ("vae_moments", self.condition)

    def build(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        mean, logvar = batch["vae_moments"].chunk(2, dim=1)
        posterior = draws.normal("unet.posterior", mean.shape[1:])
        x0 = self.scaling_factor * (mean + (0.5 * logvar).exp() * posterior)
        noise = draws.normal("unet.noise", x0.shape[1:])
        t = self.objective.timesteps(draws.uniform("unet.timestep"), draws.normal("unet.timestep"))
        output = model(self.objective.noised(x0, noise, t), t.long(), **self.conditioning(batch))[0]
        return per_sample_mse(output[:, : x0.shape[1]], noise)

    def conditioning(self, batch: Batch) -> dict[str, Any]:
        """What the network is called with besides latents and timesteps."""
        values = batch[self.condition]
        if self.condition == "text_hidden":
            return {"encoder_hidden_states": values}
        return {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": values}}

    def publish(self, model: nn.Module, folder: Any) -> dict[str, Any]:
        raise NotImplementedError("nothing is published here")


@dataclass(frozen=True)
class Dalle2Prior:
    """What our loop knows of DALLE2-pytorch's prior, whose forward pass is its loss."""

    make: Callable[[], nn.Module]
    columns: tuple[str, ...] = ("img_emb", "text_emb", "text_hidden")

    def build(self) -> nn.Module:
        return self.make()

    def loss(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:  # noqa: ARG002
        loss = model(
            image_embed=batch["img_emb"], text_embed=batch["text_emb"], text_encodings=batch["text_hidden"]
        )
        return loss.expand(len(batch["position"]))

    def publish(self, model: nn.Module, folder: Any) -> dict[str, Any]:
        raise NotImplementedError("nothing is published here")


def gflops(build: Callable[[], nn.Module], call: Callable[[Any], Tensor], *, backward: bool) -> float:
    """Billions of operations of one forward pass, and of the backward pass behind it, on the meta device."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        output = call(build().requires_grad_(backward))
        if backward:
            output.sum().backward()
    return counter.get_total_flops() / 1e9


def image_gflops(clip: ClipSizes) -> float:
    """Of the image embedding of one picture."""
    pixels = (1, 3, clip.side, clip.side)
    return gflops(
        clip.build, lambda m: m.vision_model(pixel_values=torch.empty(pixels)).pooler_output, backward=False
    )


def text_gflops(clip: ClipSizes) -> float:
    """Of the states of one caption, padded to `TOKENS`."""
    tokens = (1, TOKENS)
    return gflops(
        clip.build,
        lambda m: m.text_model(input_ids=torch.zeros(tokens, dtype=torch.long)).last_hidden_state,
        backward=False,
    )


def latent_gflops(build: Callable[[], nn.Module], side: int) -> float:
    """Of the latent of one picture."""
    return gflops(build, lambda m: m.encoder(torch.empty(1, 3, side, side)), backward=False)
