"""Encoders made elsewhere, and what an evaluation looks with: seen to be usable before anything starts, so that no run ends hours later over a download."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from data.config import Config
from data.errors import UserError
from flows import pins
from flows.plan import PlannedStage
from stages.contract import InputRef
from stages.evaluate import EvaluateConfig
from training.encoders import LOADERS
from training.metrics import extractors

CONNECT_SECONDS = 5.0


def external(stages: Iterable[PlannedStage]) -> dict[str, InputRef]:
    """kind ("clip" or "vae") -> the weights made elsewhere that `stages` read."""
    return {ref.stage: ref for stage in stages for ref in stage.inputs.values() if ref.external}


def require(stages: Iterable[PlannedStage], root: str) -> None:
    """Loads every encoder that `stages` need once, downloading what a hub name stands for; `root` is held to its commit.

    Raises UserError saying of each one that cannot be had what to download and where to put it.
    """
    stages = list(stages)
    needed = external(stages)
    if (needed or any(_names_the_hub(stage.node.config) for stage in stages)) and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = (
            "1"  # read at the hub library's import; without it each file is retried for a minute
        )
    problems = [problem for ref in needed.values() if (problem := _problem(root, ref))]
    problems += [problem for stage in stages if (problem := _unmeasurable(stage.node.config))]
    if problems:
        raise UserError("; and ".join(problems))


def _names_the_hub(config: Config) -> bool:
    return isinstance(config, EvaluateConfig) and any(
        extractors.is_download(place) for place, _ in config.weights.values()
    )


def _problem(root: str, ref: InputRef) -> str | None:
    try:
        LOADERS[ref.stage](pins.hold(root, ref).folder)
    except UserError as error:
        return str(error)
    return None


def _unmeasurable(config: Config) -> str | None:
    """Why what an evaluation looks at pictures with cannot be had."""
    if not isinstance(config, EvaluateConfig):
        return None
    try:
        for kind, (place, is_custom) in config.weights.items():
            extractors.load(kind, extractors.place_of(kind, place), is_custom=is_custom)
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
