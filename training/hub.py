"""Weights that a download brings: a hub repository as a local folder, a published file as a local path.

OWNER/NAME              what the hub has now; its folder is named by the commit
OWNER/NAME@REVISION     a commit, tag or branch
"""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from data.errors import UserError

PREFIX = "hub:"
"""What makes a name of what else would be a path, where both may be given."""
CONNECT_SECONDS = 5.0
_TRANSFORMERS = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model"
)  # fmt: skip
_VAE = ("config.json", "diffusion_pytorch_model.safetensors")
Kind = Literal["open_clip", "clip", "t5", "vae", "dinov2"]
FILES: dict[Kind, tuple[str, ...]] = {
    "open_clip": ("open_clip_config.json", "open_clip_model.safetensors"),
    "clip": (*_TRANSFORMERS, "preprocessor_config.json", "processor_config.json", *_TOKENIZER),
    "t5": (*_TRANSFORMERS, *_TOKENIZER),
    "vae": (*_VAE, *(f"vae/{name}" for name in _VAE)),
    "dinov2": _TRANSFORMERS,
}
"""What is read of a repository of each kind; weights that would have to be unpickled stay there."""
_SHOWN: dict[Kind, str] = {
    "open_clip": " and ".join(FILES["open_clip"]),
    "clip": "config.json, preprocessor_config.json, tokenizer.json and model.safetensors",
    "t5": "config.json, tokenizer.json, tokenizer_config.json and the *.safetensors weights",
    "vae": " and ".join(_VAE),
    "dinov2": "config.json and model.safetensors",
}


def folder(source: str, kind: Kind, *, called: str = "") -> Path:
    """The folder in the local cache that holds the repository `source`, with `hub:` before it or without, downloaded where it is
    missing.

    Raises UserError when it cannot be had, saying what to copy where; `called` is what the user named it by.
    """
    import huggingface_hub
    from huggingface_hub.constants import ENDPOINT

    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    is_silent = not _answers(ENDPOINT)  # the client tries a silent hub for a minute a file
    try:
        found = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=list(FILES[kind]),
            local_files_only=is_silent,
        )
    except (OSError, ValueError, RuntimeError) as error:
        why = f"{ENDPOINT} does not answer" if is_silent else _first_line(error)
        raise UserError(
            f"{called or source} is no folder here and cannot be downloaded ({why}): on a machine with a network download "
            f"{_SHOWN[kind]} of the hub repository {repository} into one folder, copy it here and give its path"
        ) from error
    return Path(found)


def is_named(source: str) -> bool:
    """Whether `source` is a name with `hub:` before it."""
    return source.startswith(PREFIX)


def pinned(source: str, kind: Kind) -> str:
    """`source` with the commit that it stands for now, so that whoever loads it later gets the same files."""
    return f"{source.partition('@')[0]}@{folder(source, kind).name}"


def file(url: str, sha256: str) -> Path:
    """The file of `url` in torch's cache, downloaded where it is missing and held against `sha256`.

    Raises UserError when it cannot be had or is another file.
    """
    import torch.hub

    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == sha256:
        return place
    try:
        if not _answers(url):
            raise OSError(f"{urlsplit(url).hostname} does not answer")
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(place), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{url} cannot be downloaded ({_first_line(error)}): fetch it on a machine with a network, copy it here and give "
            "its path"
        ) from error
    return place


def _answers(url: str) -> bool:
    """Whether something listens where `url` points; behind a proxy only the attempt itself can tell."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    at = urlsplit(url)
    try:
        port = at.port or (80 if at.scheme == "http" else 443)
        socket.create_connection((at.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
