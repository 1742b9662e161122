"""darkroom: develops image-text pairs into an evaluated text-to-image model."""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from data.errors import NO_PLACE_TO_WRITE, DarkroomError

EXAMPLES = """examples:
  darkroom run demo                                  shapes, tiny networks: a whole system in minutes, no GPU, no network
  darkroom plan demo --set denoiser.max_steps=3000   what that would run again, and why
  darkroom run demo --data ~/pictures                your own folder: metadata.jsonl, or NAME.jpg beside NAME.txt
  darkroom prepare ~/pictures --set clip.pretrained=runs/store/clip/…
  darkroom evaluate latest --sweep guidance_scale=1,2,4    the trade-off of a setting, on the run's page
  darkroom compare RUN RUN                           their scores, and the paired interval of each difference
  darkroom generate latest "a large red star in the centre of a white background"
  darkroom score --real photos --fake generated --extractor clip=runs/store/clip/…

exit codes: 0 done, 1 failed, 2 wrong input. Rerunning the same command resumes; finished work is never redone.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses `argv`, runs the command, and returns its exit code; a user's mistake is one sentence on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments)
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


def parser() -> argparse.ArgumentParser:
    """The whole command line; frozen by a test."""
    top = argparse.ArgumentParser(
        prog="darkroom",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    plan = _command(commands, "plan", _plan, "say what a run would do, and why, without starting anything")
    _recipe_options(plan)
    plan.add_argument("--check", action="store_true", help="exit 1 when anything is pending")
    run = _command(commands, "run", _run, "carry a recipe out to its report")
    _recipe_options(run)
    run.add_argument("--only", metavar="STAGE", help="run this stage alone; what it needs must be cached")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    _address(run)
    prepare = _command(
        commands, "prepare", _prepare, "preprocess alone: shards, and a column for each encoder given"
    )
    prepare.add_argument(
        "source",
        metavar="SRC",
        help="folder, table or .tar archives ({00..99} in braces) of image-text pairs, here or at a URL such as s3://…",
    )
    _common_options(prepare)
    _address(prepare)
    generate = _command(commands, "generate", _generate, "draw images for prompts with a finished run")
    generate.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    generate.add_argument("prompts", metavar="PROMPT", nargs="+")
    generate.add_argument(
        "--count", type=_positive, default=1, metavar="N", help="images per prompt (default: 1)"
    )
    generate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="image i is a function of (seed, i) (default: 0)"
    )
    generate.add_argument("--guidance-scale", type=float, metavar="G", help="default: the run's own")
    generate.add_argument(
        "--steps", type=_positive, metavar="N", help="denoising steps (default: the run's own)"
    )
    generate.add_argument(
        "--out", default="generated", metavar="DIR", help="where the PNG files go (default: ./generated)"
    )
    _root(generate)
    export = _command(
        commands,
        "export",
        _export,
        "write a finished run as a folder that diffusers' StableUnCLIPPipeline and StableUnCLIPImg2ImgPipeline load",
    )
    export.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    export.add_argument("out", metavar="DIR", help="an empty folder, or one to be made")
    _root(export)
    verify = _command(
        commands, "verify", _verify, "check every digest, count and join under a root, store or artifact"
    )
    verify.add_argument("uri", metavar="URI")
    verify.add_argument("--json", action="store_true", help="one JSON line on stdout")
    verify.add_argument(
        "--repair", action="store_true", help="make again what can be made again, then verify once more"
    )
    _address(verify)
    index = _command(
        commands, "index", _index, "write the index that another reader wants beside the shards of a data set"
    )
    index.add_argument("uri", metavar="URI", help="the folder of a shard artifact")
    index.add_argument("--kind", required=True, choices=("wids", "sizes", "energon"), help="whose index")
    index.add_argument(
        "--out",
        metavar="DIR",
        help="where it goes (default: a sub-folder that img2dataset does not look into)",
    )
    report = _command(commands, "report", _report, "print the path of a run's page")
    report.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    _root(report)
    _evaluation_commands(commands)
    _command(commands, "recipes", _recipes, "list the recipes")
    return top


def _evaluation_commands(commands: Any) -> None:
    score = _command(
        commands, "score", _score, "measure a folder of generated pictures against real ones; needs no run"
    )
    score.add_argument(
        "--real", required=True, metavar="DIR|NPZ", help="folder of real pictures, or a statistics file"
    )
    score.add_argument("--fake", required=True, metavar="DIR", help="folder of generated pictures")
    score.add_argument(
        "--metrics", default="", metavar="A,B", help="default: all common ones that the extractors allow"
    )
    score.add_argument(
        "--extractor",
        action="append",
        default=[],
        metavar="NAME[:custom]=PATH",
        help="inception=FILE.pth, clip=FOLDER, dinov2=FOLDER; inception:custom= for other weights; repeatable",
    )
    score.add_argument("--save-real", metavar="NPZ", help="keep what --real gave, for --real NPZ next time")
    score.add_argument("--json", action="store_true", help="one JSON line on stdout")
    evaluate = _command(
        commands, "evaluate", _evaluate, "evaluate a finished run at several settings of its sampler"
    )
    evaluate.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    evaluate.add_argument(
        "--sweep",
        required=True,
        metavar="FIELD=V1,V2,…",
        help="a setting of sampling and its values, such as guidance_scale=1,1.5,2,3,5,8 or num_inference_steps=10,20,50",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON line on stdout")
    evaluate.add_argument("--verbose", action="store_true", help="show what Ray and Prefect say")
    _root(evaluate)
    _address(evaluate)
    compare = _command(
        commands, "compare", _compare, "hold runs against the first, metric by metric, under one protocol"
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="runs under the root, or latest; two or more")
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field of the protocol that is under comparison besides the weights, such as guidance_scale; repeatable",
    )
    compare.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(compare)


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(command=run)
    return sub


def _recipe_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("recipe", metavar="RECIPE", help="a name from `darkroom recipes`")
    sub.add_argument(
        "--data",
        metavar="SRC",
        help="folder, table or .tar archives of image-text pairs instead of the recipe's source, here or at a URL",
    )
    _common_options(sub)


def _common_options(sub: argparse.ArgumentParser) -> None:
    _root(sub)
    sub.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one setting; repeatable",
    )
    sub.add_argument(
        "--retry-failed",
        action="store_true",
        help="attempt rows again that failed for a reason that may pass (a timeout, a busy server)",
    )
    sub.add_argument("--json", action="store_true", help="one JSON line on stdout, nothing else there")
    sub.add_argument("--verbose", action="store_true", help="show what Ray and Prefect say")


def _root(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--root", default="./runs", metavar="URL", help="where artifacts and runs lie (default: ./runs)"
    )


def _address(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--address", default="local", help="local, auto, or HOST:PORT of a Ray cluster (default: local)"
    )


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


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
    plan = make_plan(recipe, nodes, _checked_root(arguments.root))
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
    _make_folder(plan.root)
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
        if arguments.command is _prepare:
            console.out.print(f"{stage['name']:<7} {stage['uri']}", soft_wrap=True, markup=False)
    if record["report"]:
        console.out.print(record["report"], soft_wrap=True, markup=False)
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from flows import console, runs
    from flows.drawing import draw

    console.set_up_logging(verbose=False)
    record = runs.find(_checked_root(arguments.root), arguments.run)
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
    record = runs.find(_checked_root(arguments.root), arguments.run)
    with console.quiet_stdout():
        folder = export_run(record, arguments.out)
    console.out.print(str(folder), soft_wrap=True, markup=False)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from data.verify import verify
    from flows import console

    uri = _readable(arguments.uri)
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
        path = write_index(_readable(arguments.uri), arguments.kind, arguments.out)
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

    record = runs.find(_checked_root(arguments.root), arguments.run)
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
    root = _checked_root(arguments.root)
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

    compared = compare(_checked_root(arguments.root), arguments.runs, vary=arguments.vary)
    if arguments.json:
        _emit(compared)
        return 0
    console.out.print(console.comparison_table(compared))
    for row in compared["incomparable"]:
        console.out.print(f"{row['name']}: {'; '.join(row['differences'])}", soft_wrap=True, markup=False)
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
    root = _checked_root(arguments.root)
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


def _checked_root(root: str) -> str:
    """The root as an absolute path or URL; whether it can be written is seen by what writes."""
    from data import storage
    from data.errors import UserError

    if not root:
        raise UserError("--root is empty: give a folder, which is made when it is missing")
    if not storage.is_local(root):
        return _reachable(root.rstrip("/"))
    try:
        path = storage.local_path(root).expanduser().absolute()
        file = next((p for p in (path, *path.parents) if p.is_file()), None)
        path.resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a link to itself, too long a name, an unknown home folder
        raise UserError(
            f"--root {root} leads nowhere ({error}): give a folder, which is made when it is missing"
        ) from error
    if file is not None:
        what = "is a file" if file == path else f"lies under {file}, which is a file"
        raise UserError(f"--root {root} {what}: give a folder, which is made when it is missing")
    return os.path.normpath(path)


def _readable(uri: str) -> str:
    """The place to look at; UserError when nothing can lie there."""
    from data import storage
    from data.errors import UserError

    try:
        is_there = bool(uri) and storage.exists(uri)
    except Exception as error:  # each kind of store has errors of its own
        raise UserError(f"{uri} cannot be looked at ({error}): check the address") from error
    if not is_there:
        raise UserError(
            f"{uri or 'an empty name'} does not exist: give a root, its store, or one artifact's folder"
        )
    return uri.rstrip("/")


def _reachable(url: str) -> str:
    from data import storage
    from data.errors import UserError

    try:
        storage.exists(url)
    except Exception as error:  # each kind of store has errors of its own
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--root {url} cannot be reached ({line}): check the address and its credentials"
        ) from error
    return url


def _make_folder(root: str) -> None:
    from data import storage
    from data.errors import UserError

    if not storage.is_local(root):
        return
    try:
        storage.local_path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = (error.strerror or str(error)).lower()
        raise UserError(
            f"--root {root} cannot be made ({reason}): give a folder that you may write to"
        ) from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise UserError(f"--root {root} cannot be written: give a folder that you may write to")


def _emit(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def _complain(sentence: str, code: int) -> int:
    sys.stderr.write(f"darkroom: {sentence}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
