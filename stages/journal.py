"""What a stage that runs elsewhere tells of itself, as lines of its log: how far it is, and why it failed.

`python -m stages --journal` writes them between whatever else goes to that log; who launched it reads them back.
"""

from __future__ import annotations

import os
import sys
import time

from pydantic import ValidationError

from data import errors
from data.config import Config

MARK = "darkroom:"
EVERY_SECONDS = 1.0
"""Lines of progress come at most this often, but for the last one of a count."""

KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.UserError,
        errors.ShardMismatch,
        errors.CorruptArtifact,
        errors.LeaseHeld,
        errors.StageFailed,
        errors.GateFailed,
        FloatingPointError,
    )
}
"""Errors whose one sentence is all that a user needs: raised again as what they were."""


class Moved(Config):
    """`done` of `total` `unit`s are finished."""

    done: float
    total: float
    unit: str
    note: str = ""


class Failed(Config):
    """Why a stage ended without its snapshot."""

    kind: str
    """The name of the exception's class."""
    message: str
    errno: int | None = None
    filename: str | None = None

    def error(self) -> Exception:
        """What the stage raised; a StageFailed that quotes it where that was no error with a sentence of its own."""
        if self.errno is not None:
            return OSError(self.errno, os.strerror(self.errno), self.filename)
        if self.kind in KINDS:
            return KINDS[self.kind](self.message)
        if self.kind == "KeyboardInterrupt":
            return errors.StageFailed("the stage was told to stop; the same command resumes it")
        line = (self.message.strip() or self.kind).splitlines()[0]
        return errors.StageFailed(f"the stage broke down ({self.kind}: {line})")


class Journal:
    """Writes to stdout: a `Progress` that may be called from any thread, and the failure at the end."""

    def __init__(self) -> None:
        self._told = -EVERY_SECONDS

    def __call__(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Tells how far the stage is, if that was not told within the last second."""
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS or done >= total:
            self._told = now
            _write("moved", Moved(done=done, total=total, unit=unit, note=note))

    def failed(self, error: BaseException) -> None:
        """Tells why the stage ends without a snapshot."""
        is_system = isinstance(error, OSError) and error.errno is not None
        _write(
            "failed",
            Failed(
                kind=type(error).__name__,
                message=str(error),
                errno=error.errno if is_system else None,  # type: ignore[attr-defined]
                filename=str(error.filename) if is_system and error.filename else None,  # type: ignore[attr-defined]
            ),
        )


def parsed(line: str) -> Moved | Failed | None:
    """What a line of a log tells, or None for one that is not of a journal, or was cut short."""
    mark, _, document = line.strip().partition(" ")
    record = {f"{MARK}moved": Moved, f"{MARK}failed": Failed}.get(mark)
    if record is None:
        return None
    try:
        return record.model_validate_json(document)
    except ValidationError:
        return None


def _write(what: str, record: Config) -> None:
    sys.stdout.write(f"{MARK}{what} {record.model_dump_json()}\n")
    sys.stdout.flush()
