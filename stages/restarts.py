"""Which failure of a training is its end, and what is told of it: workers that die are replaced, what would fail again is not tried again."""

from __future__ import annotations

from data.errors import NO_PLACE_TO_WRITE, DarkroomError, StageFailed

IN_A_ROW = 3
"""Restarts that may follow each other without a newer checkpoint; while checkpoints advance, there is no limit."""


def final(error: BaseException) -> BaseException | None:
    """Among the causes of Ray Train's `error`, one that every restart would meet again; None where there is none.

    When one rank fails of it, the others fail too, of its silence: what these say is not asked.
    """
    return next((cause for cause in _causes(error) if _would_return(cause)), None)


def reason(error: BaseException) -> str:
    """The class of what a training failed of, by Ray Train's `error`: what attempts are counted by."""
    return type(final(error) or _causes(error)[0]).__name__


def told(error: BaseException) -> BaseException:
    """What to raise for Ray Train's `error`: the worker's own error, where that says what to do; else a StageFailed that quotes it."""
    if found := final(error):
        return found
    causes = _causes(error)
    if named := next((cause for cause in causes if isinstance(cause, OSError)), None):
        return named
    lines = str(causes[0]).strip().splitlines() or [""]
    sentence = f"training failed: {type(causes[0]).__name__}: {lines[-1]}"
    if getattr(error, "worker_failures", None):
        sentence += f" ({IN_A_ROW} restarts in a row brought no newer checkpoint)"
    return StageFailed(sentence)


def _would_return(cause: BaseException) -> bool:
    if isinstance(cause, OSError):
        return cause.errno in NO_PLACE_TO_WRITE
    return isinstance(cause, DarkroomError | FloatingPointError)


def _causes(error: BaseException) -> list[BaseException]:
    """What the workers failed of, by rank; where none did, what Ray's controller did or what else there is to blame."""
    failures = getattr(error, "worker_failures", None) or {}
    other = getattr(error, "controller_failure", None) or error.__cause__ or error
    found = [failures[rank] for rank in sorted(failures)] or [other]
    return [getattr(each, "cause", None) or each for each in found]
