"""Commands that use what a run made."""

from __future__ import annotations

import argparse

from data.errors import UserError
from flows import console, places, runs
from flows.recipes import RECIPES


def generate(arguments: argparse.Namespace) -> int:
    """Draws pictures for prompts with a run's model."""
    from flows.drawing import draw

    console.set_up_logging(verbose=False)
    record = runs.find(places.checked_root(arguments.root), arguments.run)
    sampling = {"guidance_scale": arguments.guidance_scale, "num_inference_steps": arguments.steps}
    paths = draw(
        record,
        arguments.prompts,
        count=arguments.count,
        seed=arguments.seed,
        changes=sampling,
        out=arguments.out,
    )
    for path in paths:
        console.out.print(str(path), soft_wrap=True, markup=False)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Writes a run's model as a folder that `diffusers` loads."""
    from flows.exporting import export_run

    console.set_up_logging(verbose=False)
    record = runs.find(places.checked_root(arguments.root), arguments.run)
    with console.quiet_stdout():
        folder = export_run(record, arguments.out)
    console.out.print(str(folder), soft_wrap=True, markup=False)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Says where a run's page lies."""
    record = runs.find(places.checked_root(arguments.root), arguments.run)
    if not record["report"]:
        raise UserError(
            f"run {record['run']} ended before its report: run its recipe again without --until or --only"
        )
    console.out.print(record["report"], soft_wrap=True, markup=False)
    return 0


def recipes(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    """Lists the recipes."""
    for name, build in RECIPES.items():
        console.out.print(f"{name:<8} {build().summary}", soft_wrap=True)
    return 0
