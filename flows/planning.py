"""From what a person names, on the command line or in a schedule, to a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flows import places, recipes
from flows.comparing import baselines_of
from flows.graph import prepare_nodes, unclip_nodes
from flows.plan import Plan, make_plan
from stages.contract import InputRef


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
    recipe = recipes.edited(recipes.find(name), assignments)
    recipe = recipe if data is None else recipes.with_data(recipe, data)
    root = places.checked_root(root)
    nodes = unclip_nodes(
        recipe, retry_failed=retry_failed, baselines=baselines_of(recipe, root), made=made, start=start
    )
    return make_plan(recipe, nodes, root)


def prepare_plan(source: str, *, assignments: Iterable[str], root: str, retry_failed: bool) -> Plan:
    """The plan of preprocessing `source` alone."""
    recipe = recipes.with_data(recipes.edited(recipes.prepare(), assignments), source)
    return make_plan(recipe, prepare_nodes(recipe, retry_failed=retry_failed), places.checked_root(root))
