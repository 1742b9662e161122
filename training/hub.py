"""Weights that a download brings: a hub repository as a local folder, a published file as a local path; each only when asked for.

hub:OWNER/NAME              what the hub has now; from then on its commit is told
hub:OWNER/NAME@REVISION     a commit, tag or branch
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from data.errors import UserError

PREFIX = "hub:"
_WANTED = ("*.json", "*.safetensors", "merges.txt", "spiece.model")
"""What transformers, diffusers and open_clip read of a repository; weights that would have to be unpickled stay there."""


def is_named(source: str) -> bool:
    """Whether `source` names a repository of the hub and no place on this machine."""
    return source.startswith(PREFIX)


def folder(source: str) -> Path:
    """The folder in the local cache that holds the repository `source`, downloaded where it is missing.

    Raises UserError when it cannot be had, saying what to copy where.
    """
    import huggingface_hub

    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_WANTED)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{source} cannot be downloaded ({_first_line(error)}): on a machine with a network download *.json and "
            "*.safetensors of that repository into one folder, copy it here and give its path"
        ) from error
    return Path(found)


def pinned(source: str) -> str:
    """`source` with the commit that it stands for now, so that whoever loads it later gets the same files."""
    repository = source.partition("@")[0]
    return f"{repository}@{folder(source).name}"


def file(url: str, sha256: str) -> Path:
    """The file of `url` in torch's cache, downloaded where it is missing and held against `sha256`.

    Raises UserError when it cannot be had or is another file.
    """
    import torch.hub

    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == sha256:
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(place), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{url} cannot be downloaded ({_first_line(error)}): fetch it on a machine with a network, copy it here and give "
            "its path"
        ) from error
    return place


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
