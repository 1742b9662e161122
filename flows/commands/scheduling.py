"""Commands that make things run by themselves: deployments on a server, and a server with a worker on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from data import storage
from flows import backfilling, console, places, recipes
from flows.assignments import edited
from flows.plan import Plan
from flows.planning import prepare_plan, recipe_plan


def deploy(arguments: argparse.Namespace) -> int:
    """Applies the file of deployments to the server at PREFECT_API_URL."""
    _tell(_deployed(arguments), json=arguments.json)
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Runs a server and a worker until it is told to end."""
    from flows.serving import serve as served

    root = places.checked_root(arguments.root)
    places.make_folder(root)
    home = Path(arguments.home) if arguments.home else _home(root)
    console.set_up_logging(verbose=False)
    served(
        home.expanduser().absolute(),
        arguments.port,
        lambda: _tell(_deployed(arguments), json=False),
        lambda url: console.out.print(
            f"serving {root}: {url.removesuffix('/api')} shows it, PREFECT_API_URL={url} reaches it, Ctrl-C ends it",
            soft_wrap=True,
            markup=False,
        ),
    )
    return 0


def backfill(arguments: argparse.Namespace) -> int:
    """Carries out a recipe once per dated partition; 1 where one of them fails."""
    console.set_up_logging(verbose=arguments.verbose)
    recipe = recipes.prepare() if arguments.recipe == "prepare" else recipes.find(arguments.recipe)
    edited(recipe, arguments.assignments)  # what no date would mend
    places.checked_root(arguments.root)
    given = {
        "assignments": arguments.assignments,
        "root": arguments.root,
        "retry_failed": arguments.retry_failed,
    }

    def plan_of(source: str) -> Plan:
        if arguments.recipe == "prepare":
            return prepare_plan(source, **given)
        return recipe_plan(arguments.recipe, data=source, **given)

    def tell(partition: backfilling.Partition) -> None:
        if not arguments.json:
            rest = "  ".join(filter(None, [partition.run or partition.source, partition.reason]))
            console.out.print(f"{partition.date}  {partition.state:<8} {rest}", soft_wrap=True, markup=False)

    with console.quiet_stdout():
        done = backfilling.backfill(
            arguments.data,
            arguments.since,
            arguments.until,
            plan_of,
            address=arguments.address,
            verbose=arguments.verbose,
            dry_run=arguments.dry_run,
            tell=tell,
        )
    if arguments.json:
        console.emit({"recipe": arguments.recipe, "partitions": [vars(partition) for partition in done]})
    else:
        console.out.print(backfilling.counted(done))
    return 1 if any(partition.state == "failed" for partition in done) else 0


def _home(root: str) -> Path:
    """Beside the home of embedded servers: two servers on one SQLite file would wait for each other."""
    if storage.is_local(root):
        return storage.local_path(root) / ".prefect" / "served"
    return Path.home() / ".cache" / "darkroom" / "served"


def _deployed(arguments: argparse.Namespace) -> list[Any]:
    for name, value in (("PREFECT_SERVER_ANALYTICS_ENABLED", "false"), ("DO_NOT_TRACK", "1")):
        os.environ.setdefault(name, value)
    from flows import deploying

    file = Path(arguments.file) if arguments.file else deploying.FILE
    fill = {"root": places.checked_root(arguments.root), "address": arguments.address}
    return deploying.deploy(file, fill, prune=arguments.prune)


def _tell(applied: list[Any], *, json: bool) -> None:
    if json:
        console.emit({"applied": [vars(each) for each in applied]})
        return
    rows = [
        [each.kind, each.name, ": ".join(filter(None, [each.change, ", ".join(each.details)]))]
        for each in applied
    ]
    console.out.print(console.plain_table(["", "on the server", "change"], rows, "left"))
    changes = {each.change for each in applied}
    if changes <= {"unchanged", "not in the file"}:
        console.out.print("nothing to do: the server holds all of it")
    if "not in the file" in changes:
        console.out.print("--prune removes what is not in the file")
