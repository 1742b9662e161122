"""Built-in evaluation protocols: what `evaluate.protocol=NAME` fixes, and what it needs that no one can bundle.

A protocol here fixes settings; what a value was measured under in the end is written beside it, by digest
(`training.metrics.protocol`). Two runs under one name compare only where these digests agree.
"""

from __future__ import annotations

from typing import Any

from data.config import Config


class EvaluationProtocol(Config):
    """Settings that may not differ, files that must be given, and what else the name stands for."""

    summary: str
    fixes: dict[str, Any]
    """Fields of the recipe's `evaluate` section and their values."""
    image_size: int | None = None
    """Pixels that `shard.image_size` must be; None: any."""
    needs: dict[str, str] = {}
    """Field of `evaluate` that must be given -> what to get."""
    captions: str
    reference: str
    resize: str
    extractors: tuple[str, ...]


INCEPTION = "FID's Inception weights: pt_inception-2015-12-05-6726825d.pth from pytorch-fid's releases"
COCO = "from COCO 2014 validation (annotations/captions_val2014.json of annotations_trainval2014.zip)"

PROTOCOLS: dict[str, EvaluationProtocol] = {
    "demo": EvaluationProtocol(
        summary="the demo's own: 450 prompts of the dataset, guidance 2, 12 steps",
        fixes={
            "num_images": 450,
            "images_per_prompt": 1,
            "seed": 0,
            "guidance_scale": 2.0,
            "sampler": "dpm_solver",
            "num_inference_steps": 12,
            "noise_level": 100,
            "prompts": None,
            "reconstruction_images": 256,
        },
        image_size=32,
        captions="the dataset's own list of prompts",
        reference="the training images",
        resize="the CLIP encoder's own",
        extractors=("the run's CLIP",),
    ),
    "pick5k": EvaluationProtocol(
        summary="5,000 images in 15 steps, to pick checkpoints and settings while a system is trained",
        fixes={
            "num_images": 5000,
            "images_per_prompt": 1,
            "seed": 0,
            "sampler": "dpm_solver",
            "num_inference_steps": 15,
            "reconstruction_images": 256,
        },
        captions="the dataset's own list of prompts, or its captions evenly spaced; or evaluate.prompts",
        reference="the training images",
        resize="the CLIP encoder's own; tf1 for Inception",
        extractors=("the run's CLIP", "Inception, where given"),
    ),
    "coco30k": EvaluationProtocol(
        summary="zero-shot COCO as GLIDE and unCLIP report it: 30,000 captions, 256 px, guidance free",
        fixes={"num_images": 30_000, "images_per_prompt": 1, "seed": 0},
        image_size=256,
        needs={
            "prompts": f"30,000 captions drawn at random {COCO}, one a line; no list was published, so compare only equal digests",
            "reference": "statistics of all 40,504 validation images, centre-cropped to 256 px, as npz with mu and sigma",
            "inception": INCEPTION,
        },
        captions="30,000 random captions of COCO 2014 validation, one image each",
        reference="all 40,504 images of COCO 2014 validation, centre-cropped to 256 px",
        resize="tf1 (inside the Inception graph)",
        extractors=("Inception 2015-12-05",),
    ),
    "coco30k_mlperf": EvaluationProtocol(
        summary="MLPerf Training's Stable Diffusion v2: its 30,000 captions, 512 px, guidance 8, 50 DDIM steps",
        fixes={
            "num_images": 30_000,
            "images_per_prompt": 1,
            "seed": 0,
            "guidance_scale": 8.0,
            "sampler": "ddim",
            "num_inference_steps": 50,
        },
        image_size=512,
        needs={
            "prompts": "val2014_30k.tsv of the MLPerf Training reference (30,000 captions chosen with seed 2023)",
            "reference": "its statistics of COCO 2014 validation at 512 px, as npz with mu and sigma",
            "inception": INCEPTION,
        },
        captions="val2014_30k.tsv: 30,000 captions of COCO 2014 validation, chosen with seed 2023",
        reference="MLPerf's statistics of COCO 2014 validation at 512 px",
        resize="tf1 here; NVIDIA's submission resizes to 256 px by PIL bicubic first, so its values are near and not equal",
        extractors=("Inception 2015-12-05",),
    ),
}
"""Name -> protocol."""
