"""Where a frozen encoder's weights come from, what identifies them, and in which precision they run.

A folder never touches the network; a hub name does when its weights are not in the local cache.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data import storage
from data.errors import UserError
from data.manifest import snapshots
from data.shard_cache import ShardCache

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CONFIG = "config.json"
"""What diffusers and transformers describe a network in."""
CLIP_CONFIG = "open_clip_config.json"
CLIP_WEIGHTS = "open_clip_model.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
TEXT_AND_PICTURE_FILES = frozenset(
    {
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
    }
)
"""What transformers reads of a folder besides the network: how pictures are prepared and captions are cut up."""


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, None for a hub name; of an artifact in an object store, a copy on this machine."""
    if not storage.is_local(source):
        return _fetched(source)
    path = Path(source.removeprefix("file://")).expanduser()
    return path if path.is_dir() else None


def _fetched(url: str) -> Path:
    made = max(snapshots(url), key=lambda snapshot: snapshot.created, default=None)
    if made is None:
        raise UserError(
            f"{url} holds no weights that a stage published: give such an artifact, or a folder here"
        )
    return ShardCache.of_environment().fetched(url, made.files)


def vae_folder(source: str) -> Path | None:
    """The folder of a VAE: `source` itself, or the `vae` inside a pipeline's folder. Raises UserError without a config."""
    folder = local_folder(source)
    if folder is None:
        return None
    folder = folder / "vae" if (folder / "vae" / CONFIG).is_file() else folder
    require_file(folder, CONFIG)
    return folder


def require_file(folder: Path, name: str) -> None:
    """Raises UserError when `folder` has no file `name`."""
    if not (folder / name).is_file():
        raise UserError(f"{folder} has no {name}: give a folder that holds it together with the weights")


def require_safetensors(folder: Path, what: str) -> None:
    """Raises UserError when `folder` has no weights that can be read without unpickling anything."""
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no *.safetensors weights beside its {CONFIG}: give a complete {what} folder"
        )


def config_of(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`. Raises UserError when it is not there or is no JSON object."""
    require_file(folder, name)
    try:
        config = json.loads((folder / name).read_text())
    except ValueError as error:
        raise UserError(f"{folder / name} is not JSON: copy the file again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / name} is not a JSON object: copy the file again")
    return config


def weights_digest(kind: str, source: str) -> str:
    """SHA-256 that identifies the encoder `kind` ("clip", "t5" or "vae") at `source`.

    Of a folder: over names and contents of its weights, its config, and the files of its preprocessing and tokenizer, so
    that a copy has the same digest. Of a hub name: over the name, since planning downloads nothing (`flows/pins.py` holds a
    root to the commit that it stood for at first). Raises UserError when a folder is incomplete.
    """
    folder = vae_folder(source) if kind == "vae" else local_folder(source)
    if folder is None:
        return hashlib.sha256(f"{kind}:{source}".encode()).hexdigest()
    config = CLIP_CONFIG if kind == "clip" and is_open_clip(folder) else CONFIG
    require_file(folder, config)
    # open_clip keeps its preprocessing in its config and its tokenizer in the library
    kept = {config} if kind == "vae" or config == CLIP_CONFIG else {config, *TEXT_AND_PICTURE_FILES}
    names = sorted(p.name for p in folder.iterdir() if p.name in kept or p.suffix in WEIGHT_SUFFIXES)
    lines = [f"{name} {storage.sha256(str(folder / name))[1]}" for name in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_open_clip(folder: Path) -> bool:
    """Whether `folder` is read as open_clip's local-dir form, which also wins where transformers' files lie beside it."""
    if (folder / CLIP_CONFIG).is_file() or not (folder / CONFIG).is_file():
        return True
    return config_of(folder).get("model_type") != "clip"


def frozen(model: nn.Module, device: str | torch.device) -> Any:
    """`model` for inference alone: its weights on `device`, without gradients or dropout."""
    return model.eval().requires_grad_(False).to(device)


def without_tf32() -> Any:
    """A block in which cuDNN convolves in full precision: by default it keeps ten bits of each weight, too few for features
    that are compared."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def require_uint8(pixels: Tensor) -> None:
    """Raises ValueError unless `pixels` are uint8 (B, 3, H, W)."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}; encoders take uint8 (B, 3, H, W)")
