"""`python -m stages SPEC_URI`: runs one stage from its spec, anywhere."""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from pydantic import ValidationError

from data import storage
from data.errors import NO_PLACE_TO_WRITE, DarkroomError, UserError
from stages import logs
from stages.cluster import cluster
from stages.contract import Progress, StageSpec, silent
from stages.jobs import is_job_server, run_as_job
from stages.journal import Journal

log = logging.getLogger("darkroom")


def main() -> int:
    """Exit code: 0 when the snapshot is there, 1 when the stage failed, 2 when the spec or its input is wrong, 130 when the
    stage was told to stop by SIGINT or SIGTERM: a training saves a checkpoint first, other stages finish the shards begun."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    journal = Journal() if arguments.journal else None
    try:
        logs.set_up()
        _run(arguments, journal or silent)
    except BaseException as error:
        if journal:
            journal.failed(error)
        return _exit_code(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    parser.add_argument("spec", help="path or URL of a StageSpec as JSON")
    parser.add_argument(
        "--address",
        default="local",
        help="local, auto, HOST:PORT of a Ray cluster, or http://HOST:8265 of its job server (default: local)",
    )
    parser.add_argument(
        "--then",
        action="append",
        default=[],
        metavar="SPEC",
        help="spec of a later stage: refused now if the cluster can never run it; repeatable",
    )
    parser.add_argument(
        "--journal", action="store_true", help="tell progress and failure on stdout, in lines for a program"
    )
    return parser


def _run(arguments: argparse.Namespace, progress: Progress) -> None:
    spec, *later = map(_read, (arguments.spec, *arguments.then))
    if is_job_server(arguments.address):
        run_as_job(spec, arguments.address, progress=progress, say=log.info, later=later)
        return
    from stages.catalogue import check_spec, run_spec  # every stage with all that it needs
    from stages.shared_root import check_shared

    with cluster(arguments.address):
        for each in (spec, *later):
            check_spec(each)
        check_shared(spec.folder)
        snapshot = run_spec(spec, progress)
    log.info("%s %s", snapshot.stage, snapshot.folder)


def _read(uri: str) -> StageSpec:
    try:
        return StageSpec.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise UserError(
            f"{uri} does not exist where the stage runs: give a --root that every machine of the cluster shares"
        ) from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{uri} is no file: give the spec of a stage, _meta/specs/….json of an artifact"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        what = ": ".join([*map(str, first["loc"]), first["msg"].lower()])
        raise UserError(f"{uri} is no spec that this version of Darkroom knows ({what})") from error


def _exit_code(error: BaseException) -> int:
    """What the process ends with; says why. Raises what is no failure that a user could mend."""
    if isinstance(error, KeyboardInterrupt):
        log.error("stopped; the same command resumes")
        return 130
    is_full = isinstance(error, OSError) and error.errno in NO_PLACE_TO_WRITE
    if not isinstance(error, DarkroomError | FloatingPointError | ValueError) and not is_full:
        raise error
    log.error("%s", error)
    return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(main())
