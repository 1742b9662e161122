"""Encoders made elsewhere, and what an evaluation looks with: seen to be usable before anything starts, so that no run ends hours later over a download."""

from __future__ import annotations

from collections.abc import Iterable

from data.config import Config
from data.errors import UserError
from flows import pins
from flows.plan import PlannedStage
from stages.contract import InputRef
from stages.evaluate import EvaluateConfig
from training.encoders import LOADERS
from training.metrics import extractors


def external(stages: Iterable[PlannedStage]) -> dict[str, InputRef]:
    """kind ("clip" or "vae") -> the weights made elsewhere that `stages` read."""
    return {ref.stage: ref for stage in stages for ref in stage.inputs.values() if ref.external}


def require(stages: Iterable[PlannedStage], root: str) -> None:
    """Loads every encoder that `stages` need once, downloading what a hub name stands for; `root` is held to its commit.

    Raises UserError saying of each one that cannot be had what to download and where to put it.
    """
    stages = list(stages)
    needed = external(stages)
    problems = [problem for ref in needed.values() if (problem := _problem(root, ref))]
    problems += [problem for stage in stages if (problem := _unmeasurable(stage.node.config))]
    if problems:
        raise UserError("; and ".join(problems))


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
