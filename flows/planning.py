"""From what a person names, on the command line or in a schedule, to a plan."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from flows import places, recipes
from flows.assignments import edited
from flows.comparing import baselines_of
from flows.graph import prepare_nodes, unclip_nodes
from flows.plan import Plan, make_plan
from flows.recipes import Recipe
from stages.contract import InputRef

log = logging.getLogger("darkroom")
SMALLEST_BATCH = 8


def recipe_plan(
    name: str,
    *,
    data: str | None,
    assignments: Iterable[str],
    root: str,
    retry_failed: bool,
    made: Mapping[str, InputRef] | None = None,
    start: Mapping[str, InputRef] | None = None,
) -> Plan:
    """The plan of the recipe `name` with `assignments` (`PATH=VALUE`), on `data` where it is given, over the store of `root`.

    `made` and `start` are artifacts to use instead of a training, or to begin one with. Raises UserError for whatever of
    these cannot be.
    """
    assignments = [*assignments]
    recipe = edited(recipes.find(name), assignments)
    recipe = recipe if data is None else recipes.with_data(recipe, data)
    root = places.checked_root(root)
    build = partial(
        unclip_nodes, retry_failed=retry_failed, baselines=baselines_of(recipe, root), made=made, start=start
    )
    nodes = build(recipe)
    if data is not None and (small := _fitted(recipe, nodes[0].rows, assignments)) != recipe:
        recipe, nodes = small, build(small)
    return make_plan(recipe, nodes, root)


def _fitted(recipe: Recipe, rows: int | None, assignments: Iterable[str]) -> Recipe:
    """The demo with batches that the user's `rows` can fill, where they were not set; any other recipe as it is."""
    given = {assignment.partition("=")[0].strip() for assignment in assignments}
    if recipe.name != "demo" or rows is None:
        return recipe
    smaller: dict[str, Any] = {}
    for name in ("clip", "vae", "prior", "denoiser"):
        config = getattr(recipe, name)
        if getattr(config, "pretrained", None) or f"{name}.batch_size" in given:
            continue
        samples = rows - config.held_out(rows)
        if 2 * SMALLEST_BATCH <= samples < config.batch_size:
            size = 1 << (samples // 2).bit_length() - 1
            smaller[name] = config.model_copy(update={"batch_size": size})
            log.warning(
                "%s.batch_size is %d here: %d rows fill no batch of %d", name, size, rows, config.batch_size
            )
    return recipe.model_copy(update=smaller)


def prepare_plan(source: str, *, assignments: Iterable[str], root: str, retry_failed: bool) -> Plan:
    """The plan of preprocessing `source` alone."""
    recipe = recipes.with_data(edited(recipes.prepare(), assignments), source)
    return make_plan(recipe, prepare_nodes(recipe, retry_failed=retry_failed), places.checked_root(root))
