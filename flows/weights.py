"""Encoders made elsewhere: seen to be usable before anything starts, so that no run ends hours later over a download."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from data.errors import UserError
from flows import pins
from flows.plan import PlannedStage
from stages.contract import InputRef
from training.encoders import LOADERS

CONNECT_SECONDS = 5.0


def external(stages: Iterable[PlannedStage]) -> dict[str, InputRef]:
    """kind ("clip" or "vae") -> the weights made elsewhere that `stages` read."""
    return {ref.stage: ref for stage in stages for ref in stage.inputs.values() if ref.external}


def require(stages: Iterable[PlannedStage], root: str) -> None:
    """Loads every encoder that `stages` need once, downloading what a hub name stands for; `root` is held to its commit.

    Raises UserError saying of each one that cannot be had what to download and where to put it.
    """
    needed = external(stages)
    if needed and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # read at the hub library's import; without it each file is retried for a minute
        )
    problems = [problem for ref in needed.values() if (problem := _problem(root, ref))]
    if problems:
        raise UserError("; and ".join(problems))


def _problem(root: str, ref: InputRef) -> str | None:
    try:
        LOADERS[ref.stage](pins.hold(root, ref).folder)
    except UserError as error:
        return str(error)
    return None


def _hub_answers() -> bool:
    """Whether a download can be tried; behind a proxy only the attempt itself can tell."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    hub = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
