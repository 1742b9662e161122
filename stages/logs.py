"""Log lines that know their place: sentences for people, or with DARKROOM_LOG=json one JSON object per line for programs.

A process inherits the variable from what started it; a node of a cluster has it in its environment.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

from data.errors import UserError
from data.urls import redacted

IDS = ("run", "stage", "shard")
"""What tells a line's place; a record's own `extra` goes before that of its surroundings."""
_PLACE: ContextVar[Mapping[str, str | int]] = ContextVar("darkroom_place", default=MappingProxyType({}))


@contextmanager
def at(**ids: str | int) -> Iterator[None]:
    """Inside the block, lines and figures are of this run, stage or shard."""
    token = _PLACE.set({**_PLACE.get(), **ids})
    try:
        yield
    finally:
        _PLACE.reset(token)


def place() -> Mapping[str, str | int]:
    """The ids that surround the caller."""
    return _PLACE.get()


def is_json() -> bool:
    """Whether lines are for programs."""
    return os.environ.get("DARKROOM_LOG") == "json"


def set_up(*, verbose: bool = False) -> logging.Logger:
    """Darkroom's own logger, on stderr alone. JSON has every line: programs choose by `level`.

    Raises UserError for a DARKROOM_LOG that is not known.
    """
    if (form := os.environ.get("DARKROOM_LOG")) not in (None, "", "json"):
        raise UserError(f"DARKROOM_LOG={form}: only json is known; without it, lines are for people")
    log, handler = logging.getLogger("darkroom"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if is_json() else Sentences("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose or is_json() else logging.INFO)
    return log


def set_up_worker() -> None:
    """As `set_up`, in a worker of Ray, whose stderr goes to the node's files. Lines for people stay as Ray has them."""
    if is_json():
        set_up()


class Sentences(logging.Formatter):
    """A line for people, without the credentials of any URL in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        return redacted(super().format(record))


class JsonLines(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, then run, stage, shard and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        around = place()
        ids = {name: getattr(record, name, around.get(name)) for name in IDS}
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted(record.getMessage()),
            **{name: value for name, value in ids.items() if value is not None},
            "pid": record.process,
        }
        if record.exc_info:
            line["error"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
