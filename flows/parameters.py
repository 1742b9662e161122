"""What deployed flows are started with: the form of the Prefect UI, and what the server checks before a run exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from data.config import Config
from flows.plan import Plan
from flows.planning import prepare_plan, recipe_plan
from flows.recipes import RECIPES, Recipe

RecipeName = Literal[*RECIPES]


def _settings_schema(schema: dict[str, Any]) -> None:
    """Closes the mapping: a setting that no recipe has, and a value that its field refuses, are refused by the server.

    As patterns and not as properties, of which the UI would make a form of some 250 fields.
    """
    whole = Recipe.model_json_schema()
    known = {path: leaf for path, leaf in _leaves(whole, whole) if path not in ("name", "summary")}
    schema["patternProperties"] = {f"^{re.escape(path)}$": leaf for path, leaf in known.items()}
    schema["additionalProperties"] = {"not": {"description": "no recipe has such a setting"}}


def _leaves(
    section: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in section["properties"].items():
        inner = whole["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        if "properties" in inner:
            yield from _leaves(inner, whole, f"{prefix}{name}.")
        elif "$ref" in json.dumps(field):
            yield prefix + name, {}
        else:
            yield (
                prefix + name,
                {k: v for k, v in field.items() if k not in ("title", "description", "default")},
            )


class StoreParameters(Config):
    """Where a deployed flow finds the store."""

    root: str = Field(
        description="where artifacts and runs lie: an absolute path on the worker's machine, or a URL",
        pattern=r"^(/|[a-z][a-z0-9+.-]*://)",
    )


class PlaceParameters(StoreParameters):
    """Where a deployed flow works."""

    address: str = Field("local", description="local, auto, or the address of a Ray cluster", min_length=1)
    settings: dict[str, Any] = Field(
        {},
        description='changed settings, as of --set: {"denoiser.max_steps": 500}',
        json_schema_extra=_settings_schema,
    )
    retry_failed: bool = Field(
        False,
        description="attempt rows again that failed for a reason that may pass (a timeout, a busy server)",
    )

    @property
    def assignments(self) -> list[str]:
        """`settings` as the command line takes them."""
        return assigned(self.settings)


def assigned(settings: Mapping[str, Any]) -> list[str]:
    """Settings as the command line takes them: `PATH=VALUE`."""
    return [f"{path}={v if isinstance(v, str) else json.dumps(v)}" for path, v in settings.items()]


class RunParameters(PlaceParameters):
    """A recipe, what is changed of it, and where it runs."""

    recipe: RecipeName = Field("demo", description="a name from `darkroom recipes`")
    data: str | None = Field(
        None, description="folder, table or .tar archives of image-text pairs instead of the recipe's source"
    )

    def plan(self) -> Plan:
        """What it would run; raises UserError for what cannot be."""
        return recipe_plan(
            self.recipe,
            data=self.data,
            assignments=self.assignments,
            root=self.root,
            retry_failed=self.retry_failed,
        )


class PrepareParameters(PlaceParameters):
    """Image-text pairs to preprocess."""

    data: str = Field(description="folder, table or .tar archives of image-text pairs", min_length=1)

    def plan(self) -> Plan:
        """What it would run; raises UserError for what cannot be."""
        return prepare_plan(
            self.data, assignments=self.assignments, root=self.root, retry_failed=self.retry_failed
        )


class RefreshParameters(RunParameters):
    """A recipe whose data grow, and what it takes to let a new run serve."""

    keep_encoders: bool = Field(
        True,
        description="keep CLIP and VAE of the production run, so that new shards alone are embedded and encoded, and go on "
        "training its prior and denoiser; else everything is trained anew",
    )
    continued: dict[str, Any] = Field(
        {},
        description='settings that hold where training goes on from earlier weights: {"denoiser.max_steps": 200}',
        json_schema_extra=_settings_schema,
    )
    approval: bool = Field(False, description="ask a person before production moves")
    approval_hours: float = Field(72.0, gt=0, le=24 * 90, description="how long the question stands")


class CollectParameters(StoreParameters):
    """What may go from a store."""

    keep_runs: int | None = Field(
        None,
        ge=1,
        description="forget all but that many of the newest runs first; latest, production and pinned ones stay",
    )
    older_than_hours: float = Field(24.0, ge=0, description="leave alone what changed since")
    dry_run: bool = Field(False, description="say what would go, and remove nothing")
