"""Commands that measure and compare."""

from __future__ import annotations

import argparse
from typing import Any

from flows import comparing, console, places


def score(arguments: argparse.Namespace) -> int:
    """Measures two sets of pictures against each other."""
    from flows.scoring import score as scored

    console.set_up_logging(verbose=False)
    wanted = [name for name in arguments.metrics.replace(" ", "").split(",") if name]
    with console.quiet_stdout(), console.Bars() as bars:
        found = scored(
            arguments.real,
            arguments.fake,
            wanted,
            arguments.extractor,
            lambda side, done, total: bars.show(side, done, total, "pictures"),
            save_real=arguments.save_real,
            features=arguments.features,
            images_per_prompt=arguments.images_per_prompt,
        )
    for warning in found["warnings"]:
        console.log.warning("%s", warning)
    if arguments.json:
        console.emit(found)
        return 0
    console.out.print(console.scores_table(found["scores"]))
    for line in dict.fromkeys(map(_protocol_line, found["scores"])):
        console.out.print(line, soft_wrap=True, markup=False)
    return 0


def _protocol_line(score: dict[str, Any]) -> str:
    protocol = score["protocol"]
    return f"{protocol['extractor']} {protocol['extractor_digest'][:12]}, resize: {protocol['resize']}"


def evaluate(arguments: argparse.Namespace) -> int:
    """Measures a run at every setting of a sweep."""
    from flows.sweeping import rows_of, sweep

    console.set_up_logging(verbose=arguments.verbose)
    root = places.checked_root(arguments.root)
    with console.quiet_stdout():
        found = sweep(
            root, arguments.run, arguments.sweep, address=arguments.address, verbose=arguments.verbose
        )
    if arguments.json:
        console.emit(found)
        return 0
    console.out.print(console.plain_table(*rows_of(found)))
    if found["report"]:
        console.out.print(found["report"], soft_wrap=True, markup=False)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Puts runs side by side, where their protocols allow it."""
    compared = comparing.compare(places.checked_root(arguments.root), arguments.runs, vary=arguments.vary)
    if arguments.json:
        console.emit(compared)
        return 0
    console.out.print(console.comparison_table(compared))
    for row in compared["incomparable"]:
        console.out.print(f"{row['name']}: {'; '.join(row['differences'])}", soft_wrap=True, markup=False)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Shows where two runs differ: settings, data, scores, pictures, spend."""
    from flows.diff import diff as found_between
    from flows.diff_tables import tables

    found = found_between(
        places.checked_root(arguments.root), (arguments.run, arguments.other), arguments.out
    )
    if arguments.json:
        console.emit(found)
        return 0
    for part in tables(found):
        is_line = isinstance(part, str)
        console.out.print(part, markup=not is_line, soft_wrap=is_line)
    if arguments.out:
        console.out.print(arguments.out, soft_wrap=True, markup=False)
    return 0
