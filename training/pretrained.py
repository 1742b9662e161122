"""Where a frozen encoder's weights come from, what identifies them, and in which precision they run.

A folder never touches the network; a hub name does when its weights are not in the local cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
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
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    SafetensorError,
    UnpicklingError,
    StrictDataclassError,
)
"""What torch, transformers, diffusers and open_clip were seen to raise of files that are torn, or are something else."""
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


def transformers_model(kind: Any, folder: Path, **options: Any) -> Any:
    """The network of class `kind` in `folder`, without a bar of progress. Raises UserError when weights of it are not there, or are
    of another shape, which transformers would draw at random; and one of DAMAGED."""
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda bar, args, given: bar(*args, **given | {"disable": True}))
    checked = {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    model, loading = kind.from_pretrained(folder, **checked, **options)
    require_whole(folder, loading)
    return model


def require_whole(folder: Path, loading: Mapping[str, Any]) -> None:
    """Raises UserError when a library says in `loading` that the files of `folder` do not hold all of the network's weights."""
    unfit = [each if isinstance(each, str) else each[0] for each in loading.get("mismatched_keys", ())]
    lacking = sorted({*loading["missing_keys"], *unfit})
    if lacking:
        raise UserError(
            f"{folder} does not hold the network that its {CONFIG} describes: {len(lacking)} of its weights are not there or have another "
            f"shape, {lacking[0]} for one; copy all files of one repository there again"
        )


def in_one_line(error: Exception) -> str:
    """The first 200 characters of what a library says, which may be a page; its kind where it says nothing.

    Not torch's advice to unpickle what is no tensor."""
    if isinstance(error, UnpicklingError):
        return "a pickle that is torn, or holds more than tensors"
    return " ".join(str(error).split())[:200] or type(error).__name__


def config_of(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`. Raises UserError when it is not there or is no JSON object."""
    require_file(folder, name)
    try:
        config = json.loads((folder / name).read_text())
    except (ValueError, RecursionError) as error:
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
    names = sorted(
        p.name for p in folder.iterdir() if p.is_file() and (p.name in kept or p.suffix in WEIGHT_SUFFIXES)
    )
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
