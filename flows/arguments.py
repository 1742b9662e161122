"""The command line: every command and option that there is, and what `--help` says of them."""

from __future__ import annotations

import argparse
from datetime import date
from typing import Any

DESCRIPTION = "darkroom: develops image-text pairs into an evaluated text-to-image model."
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


def parser() -> argparse.ArgumentParser:
    """The whole command line; frozen by a test."""
    top = argparse.ArgumentParser(
        prog="darkroom",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    plan = _command(commands, "plan", "say what a run would do, and why, without starting anything")
    _recipe_options(plan)
    plan.add_argument("--check", action="store_true", help="exit 1 when anything is pending")
    run = _command(commands, "run", "carry a recipe out to its report")
    _recipe_options(run)
    run.add_argument("--only", metavar="STAGE", help="run this stage alone; what it needs must be cached")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    _address(run)
    submit = _command(commands, "submit", "leave a recipe to a job of a Ray cluster, and do not wait")
    _recipe_options(submit)
    submit.add_argument(
        "--address", required=True, metavar="URL", help="http://HOST:8265 of the cluster's job server"
    )
    prepare = _command(commands, "prepare", "preprocess alone: shards, and a column for each encoder given")
    prepare.add_argument(
        "source",
        metavar="SRC",
        help="folder, table or .tar archives ({00..99} in braces) of image-text pairs, here or at a URL such as s3://…",
    )
    _common_options(prepare)
    _address(prepare)
    generate = _command(commands, "generate", "draw images for prompts with a finished run")
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
        "write a finished run as a folder that diffusers' StableUnCLIPPipeline and StableUnCLIPImg2ImgPipeline load",
    )
    export.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    export.add_argument("out", metavar="DIR", help="an empty folder, or one to be made")
    _root(export)
    verify = _command(
        commands, "verify", "check every digest, count and join under a root, store or artifact"
    )
    verify.add_argument("uri", metavar="URI")
    verify.add_argument("--json", action="store_true", help="one JSON line on stdout")
    verify.add_argument(
        "--repair", action="store_true", help="make again what can be made again, then verify once more"
    )
    _address(verify, "local, auto, or HOST:PORT of a Ray cluster")
    index = _command(
        commands, "index", "write the index that another reader wants beside the shards of a data set"
    )
    index.add_argument("uri", metavar="URI", help="folder of a shard artifact; of an embed artifact for kept")
    index.add_argument(
        "--kind",
        required=True,
        choices=("wids", "sizes", "energon", "kept"),
        help="whose index; kept: the keys that embed.min_clip_score keeps, one a line, for any reader",
    )
    index.add_argument(
        "--out",
        metavar="DIR",
        help="where it goes (default: a sub-folder that img2dataset does not look into)",
    )
    report = _command(commands, "report", "print the path of a run's page")
    report.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    _root(report)
    _evaluation_commands(commands)
    _store_commands(commands)
    _schedule_commands(commands)
    _command(commands, "recipes", "list the recipes")
    return top


def _evaluation_commands(commands: Any) -> None:
    score = _command(
        commands, "score", "measure a folder of generated pictures against real ones; needs no run"
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
        help="inception=FILE.pth, clip=FOLDER, dinov2=FOLDER; inception:custom= for other weights; to download them inception=hub, "
        "clip=hub:OWNER/NAME, dinov2=hub; repeatable",
    )
    score.add_argument(
        "--features",
        metavar="DIR",
        help="keep what the extractors saw: a call that was stopped goes on, and further metrics need no further look",
    )
    score.add_argument(
        "--images-per-prompt",
        type=int,
        default=1,
        metavar="K",
        help="pictures of --fake that follow each other by name and share a prompt; intervals keep them together",
    )
    score.add_argument("--save-real", metavar="NPZ", help="keep what --real gave, for --real NPZ next time")
    score.add_argument("--json", action="store_true", help="one JSON line on stdout")
    evaluate = _command(
        commands, "evaluate", "evaluate a finished run at several settings of its sampler, or seeds"
    )
    evaluate.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    evaluate.add_argument(
        "--sweep",
        required=True,
        metavar="FIELD=V1,V2,…",
        help="a setting of sampling and its values, such as guidance_scale=1,1.5,2,3,5,8 or num_inference_steps=10,20,50; seed=0,1,2 shows what chance does",
    )
    evaluate.add_argument("--json", action="store_true", help="one JSON line on stdout")
    evaluate.add_argument("--verbose", action="store_true", help="show what Ray and Prefect say")
    _root(evaluate)
    _address(evaluate)
    compare = _command(
        commands, "compare", "hold runs against the first, metric by metric, under one protocol"
    )
    compare.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="runs under the root, or latest, or files of `score --json`; two or more",
    )
    compare.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field of the protocol that is under comparison besides the weights, such as guidance_scale; repeatable",
    )
    compare.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(compare)
    diff = _command(commands, "diff", "say where two runs differ: settings, data, scores, pictures, time")
    diff.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    diff.add_argument("other", metavar="RUN", help="the run to hold against it")
    diff.add_argument(
        "--out", metavar="FILE", help="write an HTML page of the same prompts by both, side by side"
    )
    diff.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(diff)


def _store_commands(commands: Any) -> None:
    status = _command(
        commands, "status", "say which runs and artifacts lie under a root, and who builds what"
    )
    status.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(status)
    lineage = _command(commands, "lineage", "say what made a run or an artifact, and from which data")
    lineage.add_argument(
        "place", metavar="RUN|URI", help="a run's name under the root, or latest; or an artifact's folder"
    )
    lineage.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(lineage)
    gc = _command(commands, "gc", "remove what no run wants any more; refuses while a run is under way")
    gc.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    gc.add_argument(
        "--keep-runs",
        type=_positive,
        metavar="N",
        help="first forget all but the newest N runs; latest, production and pinned ones stay (default: every run is kept)",
    )
    gc.add_argument(
        "--forget", action="append", default=[], metavar="RUN", help="forget this run first; repeatable"
    )
    gc.add_argument(
        "--older-than",
        type=_age,
        default="1d",
        metavar="AGE",
        help="leave alone what changed since: 30m, 12h, 7d (default: 1d)",
    )
    gc.add_argument("--json", action="store_true", help="one JSON line on stdout")
    _root(gc)
    pin = _command(commands, "pin", "keep a run from every gc --keep-runs")
    pin.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    pin.add_argument("--off", action="store_true", help="no longer")
    _root(pin)
    promote = _command(
        commands, "promote", "let `production` name a run, if no metric is worse than the present holder's"
    )
    promote.add_argument("run", metavar="RUN", help="a run's name under the root, or latest")
    promote.add_argument("--force", action="store_true", help="without comparing")
    _root(promote)
    rollback = _command(commands, "rollback", "let `production` name the run that it named before")
    _root(rollback)


def _schedule_commands(commands: Any) -> None:
    deploy = _command(
        commands,
        "deploy",
        "make the Prefect server at PREFECT_API_URL hold the deployments and schedules of a file",
    )
    _deployment_options(deploy)
    deploy.add_argument("--json", action="store_true", help="one JSON line on stdout")
    serve = _command(
        commands, "serve", "run a Prefect server and a worker on this machine, with the deployments of a file"
    )
    _deployment_options(serve)
    serve.add_argument(
        "--port", type=_port, default=4200, metavar="N", help="of the server, on loopback (default: 4200)"
    )
    serve.add_argument(
        "--home",
        metavar="DIR",
        help="where its database and logs lie (default: .prefect/served under the root)",
    )

    backfill = _command(
        commands, "backfill", "carry a recipe out once per dated partition of a source, the oldest first"
    )
    backfill.add_argument(
        "recipe", metavar="RECIPE", help="a name from `darkroom recipes`, or prepare for preprocessing alone"
    )
    backfill.add_argument(
        "--data",
        required=True,
        metavar="SRC",
        help="a source with {date} in its name (s3://bucket/{date}/pairs.parquet), or a folder of folders YYYY-MM-DD",
    )
    for name, text in (("--since", "the first date"), ("--until", "the last date, included")):
        backfill.add_argument(name, required=True, type=_date, metavar="DATE", help=f"{text}, YYYY-MM-DD")
    backfill.add_argument(
        "--dry-run", action="store_true", help="say what is there, missing and made, and make nothing"
    )
    _common_options(backfill)
    _address(backfill)


def _deployment_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--file",
        metavar="YAML",
        help="the deployments (default: infra/prefect/prefect.yaml of this checkout)",
    )
    sub.add_argument(
        "--prune",
        action="store_true",
        help="remove deployments tagged `darkroom` that are not in the file; without it they are told",
    )
    _root(sub)
    _address(sub)


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text)


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


def _address(
    sub: argparse.ArgumentParser,
    places: str = "local, auto, HOST:PORT of a Ray cluster, or http://HOST:8265 of its job server",
) -> None:
    sub.add_argument("--address", default="local", help=f"{places} (default: local)")


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no date: write YYYY-MM-DD") from error


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def _port(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: write a whole number from 1 to 65535")
    return value


def _age(text: str) -> float:
    """Seconds of `90s`, `30m`, `12h` or `7d`."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    if unit is None or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no age: write 30m, 12h or 7d")
    return float(number) * unit
