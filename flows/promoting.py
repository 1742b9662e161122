"""The named pointer `production`: which run serves, which served before, and why each was moved there."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from data.errors import GateFailed, UserError
from flows import pointers, runs
from flows.comparing import measured_of
from flows.pointers import Move, history
from training.metrics.comparison import Measured
from training.metrics.gates import judge, parsed

Scores = Mapping[str, Mapping[str, Measured]]
"""Run -> its scores."""


def promote(root: str, name: str, *, force: bool, against: Scores | None = None) -> Move:
    """Moves `production` to the run `name`, where no metric is worse than the present holder's by its paired interval.

    `force` asks for no comparison; `against` has scores of holders that were measured anew. Raises GateFailed, the pointer
    staying where it is, when the run is worse or nothing compares; UserError for a run without scores, or one whose own gates
    failed.
    """
    with runs.keeping(root):  # before the run is looked up: whoever keeps the root now may forget it
        run, moves = _promotable(root, name), history(root)
        holder = moves[-1].run if moves else None
        if holder == run:
            return moves[-1]
        reason = "forced" if force else _reason(root, run, holder, against or {})
        return pointers.move(root, moves, Move(run=run, at=_now(), replaced=holder, reason=reason))


def judged(root: str, name: str, *, against: Scores | None = None) -> str:
    """Why the run `name` may be promoted; raises as `promote` does, and moves nothing."""
    moves = history(root)
    return _reason(root, _promotable(root, name), moves[-1].run if moves else None, against or {})


def _promotable(root: str, name: str) -> str:
    run, record = runs.named(root, name), runs.find(root, name)
    measured_of(root, run)
    if any(stage["status"] == "failed" for stage in record["stages"]):
        raise UserError(f"run {run} failed its own gates: it is not to be promoted")
    return run


def _reason(root: str, run: str, holder: str | None, against: Scores) -> str:
    if holder is None:
        return "nothing was there before"
    baseline = against.get(holder) or measured_of(root, holder)
    verdict = judge(parsed(f"not worse than {holder}"), measured_of(root, run), {holder: baseline})
    if not verdict.held:
        raise GateFailed(
            f"{run} is not promoted: {verdict.gate}: {verdict.reason}; "
            f"`darkroom promote {run} --force` promotes it all the same"
        )
    return f"{verdict.gate}: {verdict.reason}"


def rollback(root: str) -> Move:
    """Moves `production` back to the run that served before. Raises UserError where none did, or where it is gone."""
    with runs.keeping(root):
        moves = history(root)
        served = _served(moves)
        if len(served) < 2:
            raise UserError(
                f"no run served before the present one under {root}: there is nothing to go back to"
            )
        *before, earlier, present = served
        runs.find(root, earlier)
        replaced, reason = before[-1] if before else None, f"rolled back from {present}"
        back = Move(run=earlier, at=_now(), replaced=replaced, reason=reason, is_rollback=True)
        return pointers.move(root, moves, back)


def _served(moves: tuple[Move, ...]) -> list[str]:
    """The runs that were promoted and not rolled back from, the present one last: going back twice goes back two steps."""
    served: list[str] = []
    for move in moves:
        if move.is_rollback:
            served.pop()
        else:
            served.append(move.run)
    return served


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
