"""darkroom: develops image-text pairs into an evaluated text-to-image model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib import import_module

from data.errors import NO_PLACE_TO_WRITE, DarkroomError, no_place
from data.urls import redacted, refuse_credentials
from flows.arguments import parser
from stages import logs


def main(argv: list[str] | None = None) -> int:
    """Parses `argv`, runs the command, and returns its exit code; a user's mistake is one sentence on stderr."""
    arguments = parser().parse_args(argv)
    try:
        _refuse_credentials(arguments)
        return _command(arguments.command)(arguments)
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
        root = getattr(arguments, "root", None)
        return _complain(no_place(error, f"--root {root}" if root else "here"), 1)


def _command(name: str) -> Callable[[argparse.Namespace], int]:
    """What carries out the command; its room is imported now, since `--help` needs none."""
    return getattr(import_module(f"flows.commands.{ROOMS[name]}"), name)


def _refuse_credentials(arguments: argparse.Namespace) -> None:
    for name, value in vars(arguments).items():
        if name != "prompts":
            refuse_credentials(name, value)


def _complain(sentence: str, code: int) -> int:
    if logs.is_json():
        logs.set_up().error("%s", sentence)
    else:
        sys.stderr.write(f"darkroom: {redacted(sentence)}\n")
    return code


ROOMS = {
    "plan": "building",
    "run": "building",
    "submit": "building",
    "prepare": "building",
    "generate": "using",
    "export": "using",
    "verify": "storing",
    "index": "storing",
    "report": "using",
    "recipes": "using",
    "score": "measuring",
    "evaluate": "measuring",
    "compare": "measuring",
    "diff": "measuring",
    "status": "storing",
    "lineage": "storing",
    "gc": "storing",
    "pin": "storing",
    "promote": "storing",
    "rollback": "storing",
    "deploy": "scheduling",
    "serve": "scheduling",
    "backfill": "scheduling",
}
"""A command's name -> the module of `flows/commands` whose function of that name carries it out."""


if __name__ == "__main__":
    sys.exit(main())
