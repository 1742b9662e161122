"""The unCLIP system: text -> prior -> image embedding -> denoiser -> latent -> VAE decoder -> picture.

Legend: B batch, K prior candidates, D embedding width, T tokens, W text width, C latent channels, h w latent size.
Every random number comes from `draws`, so that picture i is a function of (seed, its index) and its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data.config import Config
from data.errors import UserError
from training.diffusion.guidance import EVERYWHERE, guided
from training.diffusion.objective import NUM_TRAIN_TIMESTEPS, Denoise, Objective, denoiser
from training.diffusion.sampling import SAMPLERS, dpm_solver, sample
from training.encoders import ClipEncoder, VaeEncoder
from training.pretrained import local_folder
from training.randomness import Draws
from training.systems import denoiser as denoiser_system
from training.systems import prior as prior_system
from training.systems.embeddings import padded, token_mask


class Sampling(Config):
    """How pictures are drawn from a trained system."""

    guidance_scale: float = Field(
        2.0, ge=0, description="classifier-free guidance of the denoiser; 1 is none"
    )
    guidance_rescale: float = Field(
        0.0, ge=0, le=1, description="share of guidance's excess spread taken back"
    )
    guidance_interval: tuple[float, float] = Field(
        EVERYWHERE,
        description="timesteps, low <= t < high of 0 to 1000, at which the denoiser is guided; at others it costs half",
    )
    threshold_percentile: float | None = Field(
        None,
        gt=0,
        le=100,
        description="dynamic thresholding of guided latents: this percentile of their magnitudes is held to what it is "
        "without guidance; 99.5 in Imagen; None: none",
    )
    sampler: Literal["dpm_solver", "ddim"] = Field(
        "dpm_solver",
        description="what integrates the denoiser: DPM-Solver++ 2M, or DDIM, of first order (Euler on the flow path)",
    )
    num_inference_steps: int = Field(
        20, ge=1, le=NUM_TRAIN_TIMESTEPS, description="steps of the denoiser's sampler"
    )
    prior_guidance_scale: float = Field(
        1.0, ge=0, description="classifier-free guidance of the prior; 1 is none"
    )
    prior_steps: int = Field(20, ge=1, le=NUM_TRAIN_TIMESTEPS, description="steps of the prior's sampler")
    prior_candidates: int = Field(
        2, ge=1, description="embeddings drawn per prompt; the one nearest to the text is kept"
    )
    noise_level: int = Field(
        0,
        ge=0,
        lt=NUM_TRAIN_TIMESTEPS,
        description="noise added to the image embedding; more varies pictures more",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        low, high = self.guidance_interval
        if not EVERYWHERE[0] <= low < high <= EVERYWHERE[1]:
            raise ValueError(
                f"guidance_interval is {low:g} to {high:g}; give 0 <= low < high <= {NUM_TRAIN_TIMESTEPS}"
            )
        return self


@dataclass(frozen=True)
class Unclip:
    """The four trained parts, ready to draw pictures."""

    clip: ClipEncoder
    vae: VaeEncoder
    prior: Any
    unet: Any
    objective: Objective
    mean: Tensor
    """(1, D) of the denoiser's widened image embeddings; `std` likewise."""
    std: Tensor

    @classmethod
    def load(
        cls, clip: str, vae: str, prior: str | Path, denoiser: str | Path, device: str | torch.device = "cpu"
    ) -> Unclip:
        """The system from its encoders' sources and the folders that the prior and the denoiser published."""
        from diffusers import PriorTransformer, UNet2DConditionModel
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

        prior, denoiser = (local_folder(str(folder)) or Path(folder) for folder in (prior, denoiser))
        normalizer = _published(StableUnCLIPImageNormalizer, denoiser, "image_normalizer")
        return cls(
            clip=ClipEncoder.load(clip, device),
            vae=VaeEncoder.load(vae, device),
            prior=_frozen(_published(PriorTransformer, prior, "prior"), device),
            unet=_frozen(_published(UNet2DConditionModel, denoiser, "unet"), device),
            objective=_objective(denoiser / "scheduler"),
            mean=normalizer.mean.detach().to(device),
            std=normalizer.std.detach().to(device),
        )

    def generate(self, prompts: Sequence[str], draws: Draws, sampling: Sampling) -> Tensor:
        """Pictures (B, 3, H, W) uint8 of `prompts`."""
        embeddings = self.predict_image_embedding(prompts, draws, sampling)
        return self.develop(embeddings, prompts, draws, sampling)

    @torch.no_grad()
    def predict_image_embedding(self, prompts: Sequence[str], draws: Draws, sampling: Sampling) -> Tensor:
        """Image embeddings (B, D) float32 that the prior imagines for `prompts`, of length about 1, as the denoiser takes them.

        Of `prior_candidates` draws the one with the largest cosine to the text embedding is kept (arXiv 2204.06125, 2.2).
        """
        batch, candidates = len(prompts), sampling.prior_candidates
        conditioning = self._text_conditioning(prompts)
        repeated = {name: c.repeat_interleave(candidates, 0) for name, c in conditioning.items()}
        denoise = guided(
            denoiser(prior_system.network(self.prior), prior_system.OBJECTIVE),
            sampling.prior_guidance_scale,
            self._text_conditioning([""]),
        )
        each = [draws.normal(f"prior.x_T.{k}", (self.clip.embed_dim,)) for k in range(candidates)]
        noise = torch.stack(each, 1).flatten(0, 1)  # (B K, D)
        scheduler = dpm_solver(prior_system.OBJECTIVE, prediction_type="sample")
        standardised = sample(denoise, scheduler, noise, sampling.prior_steps, **repeated)
        embeddings = self.prior.post_process_latents(standardised).view(batch, candidates, -1)
        embeddings = embeddings / embeddings.shape[-1] ** 0.5
        nearest = F.cosine_similarity(embeddings, conditioning["text_emb"][:, None], dim=-1).argmax(1)
        return embeddings[torch.arange(batch, device=nearest.device), nearest]

    @torch.no_grad()
    def develop(
        self, image_embeddings: Tensor, texts: Sequence[str] | None, draws: Draws, sampling: Sampling
    ) -> Tensor:
        """Pictures (B, 3, H, W) uint8 of `image_embeddings` (B, D) of length 1; without `texts`, of the embeddings alone.

        Embeddings of real pictures give variations of them, points between two of them an interpolation.
        """
        latents = self._sampled_latents(image_embeddings, texts, draws, sampling)
        return self.vae.decode(latents / self.vae.scaling_factor)

    def _sampled_latents(
        self, image_embeddings: Tensor, texts: Sequence[str] | None, draws: Draws, sampling: Sampling
    ) -> Tensor:
        level = torch.full((len(image_embeddings),), sampling.noise_level, device=image_embeddings.device)
        noise = draws.normal("develop.embedding_noise", (self.clip.embed_dim,))
        labels = denoiser_system.noised_embedding(image_embeddings, noise, level, self.mean, self.std)
        empty = self._hidden([""])
        hidden = empty.expand(len(labels), -1, -1) if texts is None else self._hidden(texts)
        denoise = self._guided_denoiser(torch.zeros_like(labels[:1]), empty, sampling)
        x_T = draws.normal("develop.x_T", self._latent_shape())  # noqa: N806
        scheduler = SAMPLERS[sampling.sampler](self.objective)
        return sample(
            denoise, scheduler, x_T, sampling.num_inference_steps, class_labels=labels, text_hidden=hidden
        )

    def _guided_denoiser(self, labels: Tensor, hidden: Tensor, sampling: Sampling) -> Denoise:
        denoise = denoiser(denoiser_system.network(self.unet), self.objective)
        unconditional = {"class_labels": labels, "text_hidden": hidden}
        return guided(
            denoise,
            sampling.guidance_scale,
            unconditional,
            rescale=sampling.guidance_rescale,
            interval=sampling.guidance_interval,
            threshold_percentile=sampling.threshold_percentile,
        )

    def _text_conditioning(self, texts: Sequence[str]) -> dict[str, Tensor]:
        embeddings, states = self.clip.text(texts, self._tokens)
        hidden, lengths = padded(states, self._tokens)
        return {"text_emb": embeddings, "text_hidden": hidden, "text_mask": token_mask(lengths, self._tokens)}

    def _hidden(self, texts: Sequence[str]) -> Tensor:
        return padded(self.clip.text(texts, self._tokens)[1], self._tokens)[0]

    @property
    def _tokens(self) -> int:
        return self.prior.config.num_embeddings

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side


def slerp(start: Tensor, end: Tensor, fractions: Tensor) -> Tensor:
    """Unit vectors (N, D) on the arc from `start` (D,) to `end` (D,), both unit, at `fractions` (N,) of it (Shoemake 1985)."""
    angle = torch.acos((start * end).sum().clamp(-1, 1))
    if angle < 1e-4:
        return F.normalize(torch.lerp(start, end, fractions[:, None]), dim=-1)
    weights = torch.stack([torch.sin((1 - fractions) * angle), torch.sin(fractions * angle)], 1) / torch.sin(
        angle
    )
    return weights @ torch.stack([start, end])


def _published(kind: Any, folder: Path, part: str) -> Any:
    if not (folder / part / "config.json").is_file():
        raise UserError(
            f"{folder} has no {part}/config.json: give the folder that the training stage published"
        )
    return kind.from_pretrained(
        folder,
        subfolder=part,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,  # the other way needs `accelerate`
    )


def _frozen(model: nn.Module, device: str | torch.device) -> nn.Module:
    return model.eval().requires_grad_(False).to(device)


def _objective(scheduler_folder: Path) -> Objective:
    from diffusers import DPMSolverMultistepScheduler

    config = DPMSolverMultistepScheduler.from_pretrained(scheduler_folder, local_files_only=True).config
    prediction_type = {"flow_prediction": "flow"}.get(config.prediction_type, config.prediction_type)
    if prediction_type == "flow":
        return Objective("flow")
    return Objective(prediction_type, config.beta_schedule, config.rescale_betas_zero_snr)
