"""Commands that build: what would run, running it, and preprocessing alone."""

from __future__ import annotations

import argparse
import sys

from data.errors import UserError
from flows import console, places, runs
from flows.plan import Plan
from flows.plan_table import show_plan
from flows.planning import prepare_plan, recipe_plan
from stages.cluster import ray_command


def plan(arguments: argparse.Namespace) -> int:
    """Shows what would run and why; 1 with `--check` where something is pending."""
    console.set_up_logging(verbose=arguments.verbose)
    plan = _recipe_plan(arguments)
    if arguments.json:
        console.emit({"recipe": plan.recipe.name, "stages": [stage.as_json() for stage in plan.stages]})
    else:
        show_plan(plan, plan.stages)
    return 1 if arguments.check and plan.pending else 0


def run(arguments: argparse.Namespace) -> int:
    """Carries out a recipe, or a part of it."""
    plan = _recipe_plan(arguments)
    names = [stage.name for stage in plan.stages]
    for option in ("only", "until"):
        chosen = getattr(arguments, option)
        if chosen and chosen not in names:
            raise UserError(f"--{option} {chosen}: the plan has no such stage; it has {', '.join(names)}")
    if arguments.only and arguments.until:
        raise UserError("--only and --until exclude each other: give one")
    if arguments.until:
        names = names[: names.index(arguments.until) + 1]
    if arguments.only:
        _refuse_missing_inputs(plan, arguments.only)
        names = [arguments.only]
    return _carry_out(plan, names, arguments)


def submit(arguments: argparse.Namespace) -> int:
    """Leaves a recipe to a job of a cluster, and says how to watch, stop and resume it."""
    from flows.submitting import submit as submitted

    console.set_up_logging(verbose=arguments.verbose)
    plan, address = _recipe_plan(arguments), arguments.address
    if not arguments.json:
        show_plan(plan, plan.stages)
    job = None
    if plan.pending:
        places.make_folder(plan.root)
        job = submitted(
            plan, arguments.recipe, arguments.assignments, address, retry_failed=arguments.retry_failed
        )
    if arguments.json:
        console.emit({"run": plan.run, "root": plan.root, "job": job, "address": address})
        return 0
    ray = ray_command()
    ways = {
        "watch": f"{ray} job logs --address {address} --follow {job}",
        "stop": f"{ray} job stop --address {address} {job}",
        "resume": "the same command again",
        "result": f"darkroom status --root {plan.root}",
    }
    for what, way in ways.items() if job else ():
        console.out.print(f"{what:<7} {way}", soft_wrap=True, markup=False)
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    """Carries out preprocessing alone: shards, and a column for each encoder given."""
    plan = prepare_plan(
        arguments.source,
        assignments=arguments.assignments,
        root=arguments.root,
        retry_failed=arguments.retry_failed,
    )
    if len(plan.stages) == 1:
        sys.stderr.write(
            "no encoder was given, so shards alone are written; --set clip.pretrained=… adds embeddings, "
            "--set t5.pretrained=… T5's states, --set vae.pretrained=… latents\n"
        )
    return _carry_out(plan, [stage.name for stage in plan.stages], arguments)


def _carry_out(plan: Plan, names: list[str], arguments: argparse.Namespace) -> int:
    console.set_up_logging(verbose=arguments.verbose)
    if not arguments.json:
        show_plan(plan, [stage for stage in plan.stages if stage.name in names])
    places.make_folder(plan.root)
    with console.quiet_stdout():
        record = runs.carry_out(plan, names=names, address=arguments.address, verbose=arguments.verbose)
    counted = {"ledger": runs.ledgers(plan)} if arguments.command == "prepare" else {}
    if arguments.json:
        metrics = {name: score["value"] for name, score in record["metrics"].items()}
        console.emit({**record, "metrics": metrics, **counted})
        return 0
    if record["metrics"]:
        console.out.print(console.scores_table(list(record["metrics"].values())))
    if all(stage["status"] == "cached" for stage in record["stages"]):
        console.out.print("nothing to do: every stage is cached")
    if counted:
        console.out.print(console.ledger_table(counted["ledger"]))
        for stage in record["stages"]:
            console.out.print(f"{stage['name']:<7} {stage['uri']}", soft_wrap=True, markup=False)
    if record["report"]:
        console.out.print(record["report"], soft_wrap=True, markup=False)
    return 0


def _recipe_plan(arguments: argparse.Namespace) -> Plan:
    return recipe_plan(
        arguments.recipe,
        data=arguments.data,
        assignments=arguments.assignments,
        root=arguments.root,
        retry_failed=arguments.retry_failed,
    )


def _refuse_missing_inputs(plan: Plan, name: str) -> None:
    pending = {stage.name for stage in plan.pending}
    stage = next(stage for stage in plan.stages if stage.name == name)
    missing = sorted({ref.stage for ref in stage.inputs.values() if not ref.external} & pending)
    if missing:
        raise UserError(f"--only {name}: it needs {', '.join(missing)}, not made yet; use --until {name}")
