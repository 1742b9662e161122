"""A trained unCLIP system as a folder that `diffusers` loads by itself: `StableUnCLIPPipeline` and `StableUnCLIPImg2ImgPipeline`.

Equal, pixel by pixel up to rounding (one level of 255), from the same noise: `StableUnCLIPPipeline` and `darkroom generate`
with `prior_candidates` 1, at every number of steps, noise level and guidance scale (1 or more), without rescale, interval or
threshold, for prompts of plain text. Of a picture's given embedding (`image_embeds`, unit length times `EMBEDDING_LENGTH`)
`StableUnCLIPImg2ImgPipeline` and `Unclip.develop` are equal likewise.

Not equal: several candidates, which the pipeline does not draw; guidance rescaled, limited to an interval or thresholded, which
it does not know; and a picture handed to `StableUnCLIPImg2ImgPipeline` itself: we divide its embedding by its length, the
pipeline has no such step, so the projection is scaled to the right length on average over `pictures`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import UserError
from training import clip_conversion
from training.diffusion.sampling import dpm_solver
from training.pixels import preprocessed
from training.systems import denoiser as denoiser_system
from training.systems import prior as prior_system
from training.systems.unclip import Unclip
from training.zeroed_padding import with_padding_taken_off, with_padding_token

INDEX = "model_index.json"


def export(system: Unclip, pictures: Tensor, folder: Path) -> None:
    """Writes the pipelines' folder; `pictures` (N, 3, H, W) uint8 set the mean length of picture embeddings.

    Raises UserError when `folder` holds anything, or when a part has no counterpart in the pipelines.
    """
    require_empty(folder)
    _require_scale(system.vae.vae)
    pipeline = _pipeline(system)
    image_encoder = clip_conversion.vision_model(system.clip)
    _lengthen(image_encoder, pictures, system)
    pipeline.save_pretrained(folder, safe_serialization=True)
    image_encoder.save_pretrained(folder / "image_encoder", safe_serialization=True)
    clip_conversion.picture_processor(system.clip).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / INDEX).read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def require_empty(folder: Path) -> None:
    """Raises UserError unless `folder` is missing or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give one that is empty or does not exist")


def _pipeline(system: Unclip) -> Any:
    from diffusers import DDPMScheduler, StableUnCLIPPipeline
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    tokens = system.prior.config.num_embeddings
    prior_text_encoder = clip_conversion.text_model(system.clip)
    tokenizer = clip_conversion.tokenizer(system.clip, tokens)
    text_encoder = with_padding_token(prior_text_encoder.text_model, tokenizer)
    normalizer = StableUnCLIPImageNormalizer(system.clip.embed_dim)
    normalizer.mean.data.copy_(system.mean)
    normalizer.std.data.copy_(system.std)
    return StableUnCLIPPipeline(
        prior_tokenizer=clip_conversion.tokenizer(system.clip, tokens),
        prior_text_encoder=prior_text_encoder,
        prior=system.prior,
        prior_scheduler=dpm_solver(prior_system.OBJECTIVE),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(beta_schedule=denoiser_system.AUGMENTATION.noise_schedule),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=with_padding_taken_off(system.unet, text_encoder),
        scheduler=dpm_solver(system.objective),
        vae=system.vae.vae,
    )


@torch.no_grad()
def _lengthen(image_encoder: Any, pictures: Tensor, system: Unclip) -> None:
    """Scales the projection so that embeddings of `pictures` have the mean length of the denoiser's own, sqrt(D)."""
    embeddings = image_encoder(preprocessed(pictures.cpu(), system.clip.preprocess)).image_embeds
    mean_length = embeddings.norm(dim=-1).mean()
    image_encoder.visual_projection.weight *= system.clip.embed_dim**0.5 / mean_length


def _require_scale(vae: nn.Module) -> None:
    config: Any = vae.config
    if not hasattr(config, "block_out_channels"):
        raise UserError(
            f"the pipelines read the scale of an AutoencoderKL and this run's VAE is a {type(vae).__name__}: choose another"
        )
