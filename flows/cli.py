"""darkroom: develops image-text pairs into an evaluated text-to-image model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from data.errors import NO_PLACE_TO_WRITE, DarkroomError
from flows import places
from flows.arguments import parser


def main(argv: list[str] | None = None) -> int:
    """Parses `argv`, runs the command, and returns its exit code; a user's mistake is one sentence on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _complain("stopped; the same command resumes", 130)
    except DarkroomError as error:
        return _complain(str(error), 2 if isinstance(error, ValueError) else 1)
    except FloatingPointError as error:
        return _complain(str(error), 1)
    except OSError as error:
        if error.errno not in NO_PLACE_TO_WRITE:
            raise
        where = error.filename or f"--root {arguments.root}"
        return _complain(
            f"{where}: {(error.strerror or str(error)).lower()}; mend that and run the same command again, finished work is kept",
            1,
        )


def _plan(arguments: argparse.Namespace) -> int:
    from flows import console

    console.set_up_logging(verbose=arguments.verbose)
    plan = _recipe_plan(arguments)
    if arguments.json:
        _emit({"recipe": plan.recipe.name, "stages": [stage.as_json() for stage in plan.stages]})
    else:
        console.show_plan(plan, plan.stages)
    return 1 if arguments.check and plan.pending else 0


def _run(arguments: argparse.Namespace) -> int:
    from data.errors import UserError

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


def _prepare(arguments: argparse.Namespace) -> int:
    from flows import recipes
    from flows.graph import prepare_nodes
    from flows.plan import make_plan

    recipe = recipes.with_data(recipes.edited(recipes.prepare(), arguments.assignments), arguments.source)
    nodes = prepare_nodes(recipe, retry_failed=arguments.retry_failed)
    plan = make_plan(recipe, nodes, places.checked_root(arguments.root))
    if len(nodes) == 1:
        sys.stderr.write(
            "no encoder was given, so shards alone are written; --set clip.pretrained=… adds embeddings, "
            "--set vae.pretrained=… latents\n"
        )
    return _carry_out(plan, [stage.name for stage in plan.stages], arguments)


def _carry_out(plan: Any, names: list[str], arguments: argparse.Namespace) -> int:
    from flows import console, runs

    console.set_up_logging(verbose=arguments.verbose)
    if not arguments.json:
        console.show_plan(plan, [stage for stage in plan.stages if stage.name in names])
    places.make_folder(plan.root)
    with console.quiet_stdout():
        record = runs.carry_out(plan, names=names, address=arguments.address, verbose=arguments.verbose)
    if arguments.json:
        metrics = {name: score["value"] for name, score in record["metrics"].items()}
        _emit({**record, "metrics": metrics})
        return 0
    if record["metrics"]:
        console.out.print(console.scores_table(list(record["metrics"].values())))
    if all(stage["status"] == "cached" for stage in record["stages"]):
        console.out.print("nothing to do: every stage is cached")
    for stage in record["stages"]:
        if arguments.command == "prepare":
            console.out.print(f"{stage['name']:<7} {stage['uri']}", soft_wrap=True, markup=False)
    if record["report"]:
        console.out.print(record["report"], soft_wrap=True, markup=False)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from flows import console, runs
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


def _score(arguments: argparse.Namespace) -> int:
    from flows import console
    from flows.scoring import score

    console.set_up_logging(verbose=False)
    wanted = [name for name in arguments.metrics.replace(" ", "").split(",") if name]
    with console.quiet_stdout(), console.Bars() as bars:
        found = score(
            arguments.real,
            arguments.fake,
            wanted,
            arguments.extractor,
            arguments.save_real,
            lambda side, done, total: bars.show(side, done, total, "pictures"),
        )
    for warning in found["warnings"]:
        console.log.warning("%s", warning)
    if arguments.json:
        _emit(found)
        return 0
    console.out.print(console.scores_table(found["scores"]))
    for line in dict.fromkeys(map(_protocol_line, found["scores"])):
        console.out.print(line, soft_wrap=True, markup=False)
    return 0


def _protocol_line(score: dict[str, Any]) -> str:
    protocol = score["protocol"]
    return f"{protocol['extractor']} {protocol['extractor_digest'][:12]}, resize: {protocol['resize']}"


def _export(arguments: argparse.Namespace) -> int:
    from flows import console, runs
    from flows.exporting import export_run

    console.set_up_logging(verbose=False)
    record = runs.find(places.checked_root(arguments.root), arguments.run)
    with console.quiet_stdout():
        folder = export_run(record, arguments.out)
    console.out.print(str(folder), soft_wrap=True, markup=False)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from data.verify import verify
    from flows import console

    uri = places.readable(arguments.uri)
    verdict, mended = verify(uri), ()
    if arguments.repair and not verdict.ok:
        from stages.cluster import cluster
        from stages.repair import repair

        with console.quiet_stdout(), cluster(arguments.address):
            repaired = repair(uri, found=verdict)
        verdict, mended = repaired.verdict, repaired.mended
    if arguments.json:
        extra = {"mended": [m.model_dump(mode="json") for m in mended]} if arguments.repair else {}
        _emit(verdict.model_dump(mode="json") | extra)
        return 0 if verdict.ok else 1
    for file in mended:
        console.out.print(f"{file.uri} {file.how}", soft_wrap=True, markup=False)
    for problem in verdict.problems:
        console.out.print(f"{problem.uri} {problem.problem}", soft_wrap=True, markup=False)
    rows = f"{verdict.attempted} rows attempted = {verdict.written} written + {verdict.filtered} filtered + {verdict.failed} failed"
    console.out.print(f"{'sound' if verdict.ok else f'{len(verdict.problems)} problems'}: {rows}")
    return 0 if verdict.ok else 1


def _index(arguments: argparse.Namespace) -> int:
    from data.errors import CorruptArtifact, UserError
    from data.indexes import write_index
    from flows import console

    try:
        path = write_index(places.readable(arguments.uri), arguments.kind, arguments.out)
    except FileNotFoundError as error:
        raise CorruptArtifact(
            f"{error.filename} is missing: run `darkroom verify --repair {arguments.uri}`"
        ) from error
    except NotADirectoryError as error:
        raise UserError(f"--out {arguments.out} is no folder and cannot become one: give another") from error
    console.out.print(path, soft_wrap=True, markup=False)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from data.errors import UserError
    from flows import console, runs

    record = runs.find(places.checked_root(arguments.root), arguments.run)
    if not record["report"]:
        raise UserError(
            f"run {record['run']} ended before its report: run its recipe again without --until or --only"
        )
    console.out.print(record["report"], soft_wrap=True, markup=False)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from flows import console
    from flows.sweeping import rows_of, sweep

    console.set_up_logging(verbose=arguments.verbose)
    root = places.checked_root(arguments.root)
    with console.quiet_stdout():
        found = sweep(
            root, arguments.run, arguments.sweep, address=arguments.address, verbose=arguments.verbose
        )
    if arguments.json:
        _emit(found)
        return 0
    console.out.print(console.plain_table(*rows_of(found)))
    if found["report"]:
        console.out.print(found["report"], soft_wrap=True, markup=False)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from flows import console
    from flows.comparing import compare

    compared = compare(places.checked_root(arguments.root), arguments.runs, vary=arguments.vary)
    if arguments.json:
        _emit(compared)
        return 0
    console.out.print(console.comparison_table(compared))
    for row in compared["incomparable"]:
        console.out.print(f"{row['name']}: {'; '.join(row['differences'])}", soft_wrap=True, markup=False)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from flows import console, keeping

    found = keeping.status(places.checked_root(arguments.root))
    if arguments.json:
        _emit(found)
        return 0
    console.show_status(found)
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    from flows import console, keeping

    found = keeping.collect(
        places.checked_root(arguments.root),
        keep_runs=arguments.keep_runs,
        forget=arguments.forget,
        older_than=arguments.older_than,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        _emit(found)
        return 0
    console.show_collected(found)
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    from flows import console, keeping

    run = keeping.pin(places.checked_root(arguments.root), arguments.run, pinned=not arguments.off)
    console.out.print(f"{run} is {'no longer ' if arguments.off else ''}pinned", soft_wrap=True, markup=False)
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    from flows import promoting

    root = places.checked_root(arguments.root)
    return _tell_move(promoting.promote(root, arguments.run, force=arguments.force))


def _rollback(arguments: argparse.Namespace) -> int:
    from flows import promoting

    return _tell_move(promoting.rollback(places.checked_root(arguments.root)))


def _tell_move(move: Any) -> int:
    from flows import console

    console.out.print(
        f"production is {move.run} since {move.at}: {move.reason}", soft_wrap=True, markup=False
    )
    return 0


def _recipes(arguments: argparse.Namespace) -> int:  # noqa: ARG001
    from flows import console
    from flows.recipes import RECIPES

    for name, build in RECIPES.items():
        console.out.print(f"{name:<8} {build().summary}", soft_wrap=True)
    return 0


def _recipe_plan(arguments: argparse.Namespace) -> Any:
    from flows import recipes
    from flows.comparing import baselines_of
    from flows.graph import unclip_nodes
    from flows.plan import make_plan

    recipe = recipes.edited(recipes.find(arguments.recipe), arguments.assignments)
    recipe = recipe if arguments.data is None else recipes.with_data(recipe, arguments.data)
    root = places.checked_root(arguments.root)
    baselines = baselines_of(recipe, root)
    nodes = unclip_nodes(recipe, retry_failed=arguments.retry_failed, baselines=baselines)
    return make_plan(recipe, nodes, root)


def _refuse_missing_inputs(plan: Any, name: str) -> None:
    from data.errors import UserError

    pending = {stage.name for stage in plan.pending}
    stage = next(stage for stage in plan.stages if stage.name == name)
    missing = sorted({ref.stage for ref in stage.inputs.values() if not ref.external} & pending)
    if missing:
        raise UserError(f"--only {name}: it needs {', '.join(missing)}, not made yet; use --until {name}")


def _emit(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _complain(sentence: str, code: int) -> int:
    sys.stderr.write(f"darkroom: {sentence}\n")
    return code


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "run": _run,
    "prepare": _prepare,
    "generate": _generate,
    "export": _export,
    "verify": _verify,
    "index": _index,
    "report": _report,
    "recipes": _recipes,
    "score": _score,
    "evaluate": _evaluate,
    "compare": _compare,
    "status": _status,
    "gc": _gc,
    "pin": _pin,
    "promote": _promote,
    "rollback": _rollback,
}
"""A command's name -> what carries it out; returns the exit code."""


if __name__ == "__main__":
    sys.exit(main())
