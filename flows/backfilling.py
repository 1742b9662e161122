"""The past made up for: one run per dated partition of a source, in order of the dates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

from data import storage
from data.errors import DarkroomError, UserError
from flows import places, runs
from flows.plan import Plan

PLACE = "{date}"


@dataclass(frozen=True)
class Partition:
    """What lies under one date, and what became of it."""

    date: str
    source: str
    state: str
    """missing (the source has nothing there), cached, pending, ran, or failed."""
    run: str = ""
    reason: str = ""
    """Why it failed."""


def backfill(
    source: str,
    since: date,
    until: date,
    plan_of: Callable[[str], Plan],
    *,
    address: str,
    verbose: bool,
    dry_run: bool,
    tell: Callable[[Partition], None],
) -> list[Partition]:
    """Carries out `plan_of` each partition of `source` from `since` to `until`, both included; tells of each, returns all.

    A partition that fails is told of, and the next one goes on. Raises UserError where there is no partition at all.
    """
    sources = list(_sources(source, since, until))
    there = {day: place for day, place in sources if _exists(place)}
    if not there:
        raise UserError(
            f"{source} has nothing from {since} to {until}: looked for {sources[0][1]} to {sources[-1][1]}"
        )
    done = []
    for day, place in sources:
        partition = Partition(str(day), place, "pending" if day in there else "missing")
        if day in there:
            partition = _made(partition, plan_of, address=address, verbose=verbose, dry_run=dry_run)
        tell(partition)
        done.append(partition)
    return done


def counted(partitions: Sequence[Partition]) -> str:
    """How many came to what, in a line."""
    states = [partition.state for partition in partitions]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _sources(source: str, since: date, until: date) -> Iterator[tuple[date, str]]:
    """Each date with its place: `{date}` replaced, or else the sub-folder of that name."""
    if since > until:
        raise UserError(f"--since {since} is after --until {until}: exchange them")
    pattern = source if PLACE in source else storage.join(source, PLACE)
    for days in range((until - since).days + 1):
        day = since + timedelta(days)
        yield day, pattern.replace(PLACE, str(day))


def _exists(place: str) -> bool:
    try:
        return storage.exists(place)
    except Exception as error:  # each kind of store has errors of its own
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--data {place} cannot be reached ({line}): check the address and its credentials"
        ) from error


def _made(
    partition: Partition, plan_of: Callable[[str], Plan], *, address: str, verbose: bool, dry_run: bool
) -> Partition:
    try:
        plan = plan_of(partition.source)
        partition = replace(partition, run=plan.run, state="pending" if plan.pending else "cached")
        if plan.pending and not dry_run:
            places.make_folder(plan.root)
            names = [stage.name for stage in plan.stages]
            runs.carry_out(plan, names=names, address=address, verbose=verbose)
            return replace(partition, state="ran")
    except DarkroomError as error:
        return replace(partition, state="failed", reason=str(error))
    return partition
