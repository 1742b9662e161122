"""Images for prompts from a finished run, on this machine alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import ValidationError

from data import storage
from data.errors import UserError
from training.distributed import device
from training.randomness import Draws
from training.systems.unclip import Sampling, Unclip

BATCH = 50
OPTIONS = {"guidance_scale": "--guidance-scale", "num_inference_steps": "--steps"}


def draw(
    record: Mapping[str, Any],
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    changes: Mapping[str, Any],
    out: str,
) -> list[Path]:
    """Writes `count` PNGs per prompt under `out`; returns their paths. `changes` that are not None replace the run's sampling."""
    folders = trained_parts(record)
    evaluation = record["recipe"].get("evaluate") or {}
    chosen = {name: evaluation[name] for name in Sampling.model_fields if name in evaluation} | {
        k: v for k, v in changes.items() if v is not None
    }
    try:
        sampling = Sampling.model_validate(chosen)
    except ValidationError as error:
        first = error.errors()[0]
        option = OPTIONS.get(str(first["loc"][0]), first["loc"][0])
        raise UserError(f"{option} {first['input']}: {first['msg'].lower()}") from error
    system = Unclip.load(folders["clip"], folders["vae"], folders["prior"], folders["denoiser"], device())
    texts = [prompt for prompt in prompts for _ in range(count)]
    folder, paths = Path(out), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: {error.filename} is a file; give a folder") from error
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        index = torch.arange(start, start + len(part), device=device())
        images = system.generate(part, Draws(seed, index), sampling).permute(0, 2, 3, 1).cpu().numpy()
        for offset, (text, image) in enumerate(zip(part, images, strict=True)):
            path = folder / f"{start + offset:04d}_{_slug(text)}.png"
            Image.fromarray(image).save(path)
            paths.append(path)
    return paths


def trained_parts(record: Mapping[str, Any]) -> dict[str, str]:
    """Folder of each stage of a run. Raises UserError when it ended before its prior or denoiser was trained."""
    folders = {**record["folders"], **record["external"]}
    for part in ("prior", "denoiser"):
        if part not in folders or not storage.exists(storage.join(folders[part], "_meta")):
            raise UserError(
                f"run {record['run']} has no {part}: run its recipe again without --until or --only"
            )
    return folders


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48] or "image"
