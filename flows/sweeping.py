"""One sampling setting of a finished run over several values, or several seeds: each an evaluation of its own in the store, and
their trade-off or spread."""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from data import storage
from data.errors import UserError
from flows import runs
from flows.comparing import baselines_of
from flows.graph import unclip_nodes
from flows.plan import Plan, make_plan
from flows.recipes import Recipe
from stages.evaluate import SCORES
from stages.generate import GenerateConfig
from stages.report import page
from training.metrics.tradeoff import DISTANCES, FIT, SEED, Point, Sweep
from training.systems.unclip import Sampling

MADE = ("generate", "evaluate")
"""The stages of a point; what they read must be in the store."""
SWEPT = (*(name for name in Sampling.model_fields if name != "guidance_interval"), SEED)
"""All but a pair of numbers, which is no point on an axis."""


def parsed(text: str) -> tuple[str, list[Any]]:
    """The field and the values of `--sweep FIELD=V1,V2,…`, typed and checked; UserError saying what may be swept."""
    field, separator, listed = (part.strip() for part in text.partition("="))
    if field not in SWEPT:
        near = difflib.get_close_matches(field, SWEPT, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--sweep {field}: sampling has no such setting; {hint}it has {', '.join(SWEPT)}")
    values = [value.strip() for value in listed.split(",") if value.strip()] if separator else []
    if not values:
        raise UserError(
            f"--sweep {text} has no values: write {field}=V1,V2,… such as guidance_scale=1,1.5,2,3,5,8"
        )
    try:
        given = [None if value.lower() in ("none", "null") else value for value in values]
        typed = [getattr(GenerateConfig.model_validate({field: value}), field) for value in given]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--sweep {field}={first['input']}: {first['msg'].lower()}") from error
    return field, list(dict.fromkeys(typed))


def sweep(root: str, name: str, text: str, *, address: str, verbose: bool) -> dict[str, Any]:
    """Generates and evaluates the points that are not in the store; returns what `evaluate --json` prints.

    The run's own setting is always a point: it is there already. Writes `sweep_FIELD.json` and `.parquet` beside the run's
    page, and the page again with the curves. Raises UserError when the run's own stages are not in the store any more.
    """
    field, values = parsed(text)
    record = runs.find(root, name)
    recipe = _recipe(record)
    own = getattr(recipe.evaluate, field)
    plans = {value: _plan(recipe, field, value, root) for value in sorted({*values, own}, key=_order)}
    _refuse_missing(plans[own], record["run"])
    pending = [stage for plan in plans.values() for stage in plan.pending if stage.name in MADE]
    if pending:
        runs.note_start(root, record["run"], list(plans.values()))
        runs.run_stages(plans[own], pending, address=address, verbose=verbose)
    points = tuple(_point(plan, value, value == own) for value, plan in plans.items())
    found = Sweep.of(field, points)
    folder = storage.join(root, record["run"])
    _write(folder, found)
    if pending:
        storage.remove(storage.join(folder, runs.STARTED))
    report = _draw(plans[own], folder)
    return {
        "run": record["run"],
        **found.model_dump(mode="json"),
        "made": sum(stage.name == "generate" for stage in pending),
        "report": report,
    }


def _recipe(record: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(record["recipe"])
    except (KeyError, ValidationError) as error:
        raise UserError(
            f"run {record['run']} was made with settings that this version does not know: run its recipe again"
        ) from error


def _plan(recipe: Recipe, field: str, value: Any, root: str) -> Plan:
    evaluation = recipe.evaluate.model_copy(update={field: value, "protocol": None})
    recipe = recipe.model_copy(update={"evaluate": evaluation})
    return make_plan(recipe, unclip_nodes(recipe, baselines=baselines_of(recipe, root)), root)


def _refuse_missing(plan: Plan, run: str) -> None:
    missing = [stage.name for stage in plan.pending if stage.name not in (*MADE, "report")]
    if missing:
        raise UserError(
            f"run {run}: {', '.join(missing)} would be made again, since the store or the source changed; run its recipe first"
        )


def _order(value: Any) -> tuple[bool, bool, Any]:
    """Numbers by size, then words; what is switched off comes first of all."""
    return isinstance(value, str), value is not None, value if value is not None else 0


def _point(plan: Plan, value: Any, own: bool) -> Point:
    folder = next(stage.folder for stage in plan.stages if stage.name == "evaluate")
    rows = json.loads(storage.read_bytes(storage.join(folder, SCORES)))["scores"]
    scores = {row["name"]: (row["value"], row["low"], row["high"]) for row in rows}
    return Point(setting="none" if value is None else value, own=own, scores=scores, uri=folder)


def _write(folder: str, found: Sweep) -> None:
    path = storage.join(folder, f"sweep_{found.field}")
    storage.write_bytes(f"{path}.json", (found.model_dump_json(indent=1) + "\n").encode())
    rows = [
        {"field": found.field, "setting": str(point.setting), "own": point.own, "metric": metric}
        | {"value": value, "low": low, "high": high}
        | {f"pareto_{c.distance}": point.setting in c.pareto for c in found.curves}
        for point in found.points
        for metric, (value, low, high) in point.scores.items()
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    storage.write_bytes(f"{path}.parquet", buffer.getvalue())


def _draw(plan: Plan, folder: str) -> str | None:
    """The run's page again, with every sweep beside it; None where the run ended before its report."""
    stage = next(stage for stage in plan.stages if stage.name == "report")
    if stage.status == "pending":
        return None
    spec = runs.spec_of(plan, stage)
    inputs = {role: ref.open() for role, ref in spec.inputs.items()}
    path = storage.join(folder, "report.html")
    storage.write_bytes(path, page(spec.config, inputs).encode())
    return path


def rows_of(printed: dict[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    """Header and rows of a table: one row per point, its distances and CLIP score, and what each point is."""
    names = [name for name in (*DISTANCES, FIT) if name in printed["points"][0]["scores"]]
    rows = []
    for point in printed["points"]:
        marks = ["the run's own"] if point["own"] else []
        for curve in printed["curves"]:
            if point["setting"] == curve["best"]:
                marks.append(f"best {curve['distance']}")
            elif point["setting"] in curve["pareto"]:
                marks.append(f"on the front of {curve['distance']}")
        values = ["{:.4g} ({:.4g} – {:.4g})".format(*point["scores"][name]) for name in names]
        rows.append([str(point["setting"]), *values, ", ".join(marks)])
    if spread := printed["spread"]:
        between = ["{:.4g} ± {:.2g}".format(*spread[name]) if name in spread else "" for name in names]
        rows.append(["mean ± deviation", *between, "between seeds"])
    return [printed["field"], *names, ""], rows
