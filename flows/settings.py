"""Settings by the paths that `--set` takes: those of a recipe, and those that one artifact was made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SECTIONS = {"shard": "", "generate": "evaluate.", "report": "evaluate."}
"""Stage -> prefix that its config's fields have in the recipe; a stage's own name otherwise."""


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields as {"section.field": value}."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def of_stage(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Path in the recipe -> value, of the result fields that a stage's snapshot keeps."""
    return flat(config, SECTIONS.get(stage, f"{stage}."))
