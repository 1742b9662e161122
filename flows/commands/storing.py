"""Commands about what lies under a root: whether it is sound, what may go, which run serves."""

from __future__ import annotations

import argparse

from data.errors import CorruptArtifact, UserError
from data.indexes import write_index
from data.verify import verify as verified
from flows import console, keeping, places, promoting
from flows.pointers import Move


def verify(arguments: argparse.Namespace) -> int:
    """Checks what lies under a place, and mends it with `--repair`; 1 where it is not sound."""
    uri = places.readable(arguments.uri)
    verdict, mended = verified(uri), ()
    if arguments.repair and not verdict.ok:
        from stages.cluster import cluster
        from stages.repair import repair

        with console.quiet_stdout(), cluster(arguments.address):
            repaired = repair(uri, found=verdict)
        verdict, mended = repaired.verdict, repaired.mended
    if arguments.json:
        extra = {"mended": [m.model_dump(mode="json") for m in mended]} if arguments.repair else {}
        console.emit(verdict.model_dump(mode="json") | extra)
        return 0 if verdict.ok else 1
    for file in mended:
        console.out.print(f"{file.uri} {file.how}", soft_wrap=True, markup=False)
    for problem in verdict.problems:
        console.out.print(f"{problem.uri} {problem.problem}", soft_wrap=True, markup=False)
    for line in console.checked_lines(verdict.checked):
        console.out.print(line, soft_wrap=True, markup=False)
    rows = f"{verdict.attempted} rows attempted = {verdict.written} written + {verdict.filtered} filtered + {verdict.failed} failed"
    console.out.print(f"{'sound' if verdict.ok else f'{len(verdict.problems)} problems'}: {rows}")
    return 0 if verdict.ok else 1


def index(arguments: argparse.Namespace) -> int:
    """Writes an index that other tools read."""
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


def status(arguments: argparse.Namespace) -> int:
    """Shows what runs, what is finished and how much room it takes."""
    found = keeping.status(places.checked_root(arguments.root))
    if arguments.json:
        console.emit(found)
        return 0
    console.show_status(found)
    return 0


def lineage(arguments: argparse.Namespace) -> int:
    """Shows what made a run or an artifact, up to the rows of the source."""
    from flows.lineage import lineage as followed
    from flows.lineage_tree import tree

    found = followed(places.checked_root(arguments.root), arguments.place)
    if arguments.json:
        console.emit(found.model_dump(mode="json"))
        return 0
    console.out.print(tree(found))
    return 0


def gc(arguments: argparse.Namespace) -> int:
    """Removes what no run, pin or pointer needs."""
    found = keeping.collect(
        places.checked_root(arguments.root),
        keep_runs=arguments.keep_runs,
        forget=arguments.forget,
        older_than=arguments.older_than,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        console.emit(found)
        return 0
    console.show_collected(found)
    return 0


def pin(arguments: argparse.Namespace) -> int:
    """Keeps a run from `gc`, or lets it go with `--off`."""
    run = keeping.pin(places.checked_root(arguments.root), arguments.run, pinned=not arguments.off)
    console.out.print(f"{run} is {'no longer ' if arguments.off else ''}pinned", soft_wrap=True, markup=False)
    return 0


def promote(arguments: argparse.Namespace) -> int:
    """Moves `production` to a run."""
    root = places.checked_root(arguments.root)
    return _tell_move(promoting.promote(root, arguments.run, force=arguments.force))


def rollback(arguments: argparse.Namespace) -> int:
    """Moves `production` back."""
    return _tell_move(promoting.rollback(places.checked_root(arguments.root)))


def _tell_move(move: Move) -> int:
    console.out.print(
        f"production is {move.run} since {move.at}: {move.reason}", soft_wrap=True, markup=False
    )
    return 0
