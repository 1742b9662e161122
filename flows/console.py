"""What people see: tables on the terminal, a progress bar per stage on stderr, one quiet logger."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from data.verify import Checked
from stages import logs

PIPE_WIDTH = 120
"""Columns where stdout is no terminal and the environment gives none."""
MEANING_WIDTH = 110
err = Console(stderr=True, highlight=False)
out = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH)
log = logging.getLogger("darkroom")
NOISY = (
    "prefect",
    "ray",
    "httpx",
    "alembic",
    "uvicorn",
    "docket",
    "absl",
    "open_clip",
    "diffusers",
    "transformers",
    "huggingface_hub",
)
QUIET_SECONDS = 15.0
"""Without a terminal, at most one line of progress per stage in this time."""


def emit(document: Mapping[str, Any]) -> None:
    """Writes `document` as one line of JSON to stdout."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def set_up_logging(*, verbose: bool) -> None:
    """One handler on stderr; the libraries speak only with `verbose`."""
    logs.set_up(verbose=verbose)
    if not verbose:
        warnings.simplefilter("ignore")
        logging.getLogger().addHandler(
            logging.NullHandler()
        )  # without one, a library's first word sets up its own
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


def scores_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """Every headline number with its 95 % interval, and what it means where the terminal is wide enough."""
    wide = out.width >= MEANING_WIDTH
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("score", no_wrap=True)
    for name in ("value", "95 % interval", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("meaning", overflow="fold")
    for score in scores:
        interval = f"{score['low']:.4g} – {score['high']:.4g}"
        better = "↑" if score["better"] == "higher" else "↓"
        meaning = [escape(score["meaning"])] if wide else []
        table.add_row(
            f"{score['name']} {better}", f"{score['value']:.4g}", interval, str(score["n"]), *meaning
        )
    return table


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], justify: Literal["left", "right"] = "right"
) -> Table:
    """Rows of text under a header; figures stand to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in header:
        table.add_column(name, justify=justify if name else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def ledger_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Where every attempted row of each stage went, with the reasons of those that were not written."""
    cells = [
        [
            row["stage"],
            f"{row['attempted']:,}",
            f"{row['written']:,}",
            *(_counts(row[n]) for n in ("filtered", "failed")),
        ]
        for row in rows
    ]
    return plain_table(["stage", "attempted", "written", "filtered", "failed"], cells, "left")


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "0"


def comparison_table(compared: Mapping[str, Any]) -> Table:
    """Runs in columns, metrics in rows, and each later run's paired difference from the first."""
    first, *others = compared["runs"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("score", no_wrap=True)
    for name in compared["runs"]:
        table.add_column(escape(name), justify="right")
    for name in others:
        table.add_column(escape(f"{name} − {first}, 95 %"), justify="right")
    for row in compared["metrics"]:
        arrow = "↑" if row["better"] == "higher" else "↓"
        values = [f"{row['values'][name]['value']:.4g}" for name in compared["runs"]]
        held = [difference(row["against_first"][name]) for name in others]
        table.add_row(f"{row['name']} {arrow}", *values, *held)
    for row in compared["incomparable"]:
        values = [
            f"{row['values'][n]['value']:.4g} [{row['values'][n]['protocol'][:6]}]" for n in compared["runs"]
        ]
        table.add_row(row["name"], *map(escape, values), *["other protocol"] * len(others), style="dim")
    return table


def show_status(found: Mapping[str, Any]) -> None:
    """Prints the runs and the artifacts of a root."""
    if not found["runs"] and not found["artifacts"]:
        out.print(f"{found['root']} holds no run and no artifact", soft_wrap=True, markup=False)
        return
    marks = [(run, name) for name, run in found["pointers"].items()]
    runs = [
        [
            r["run"],
            ", ".join(
                [
                    r["state"],
                    *(["pinned"] if r["pinned"] else []),
                    *(n for run, n in marks if run == r["run"]),
                ]
            ),
            r["finished"],
        ]
        for r in found["runs"]
    ]
    out.print(plain_table(["run", "state", "finished (UTC)"], runs, "left"))
    out.print(_artifacts(found["artifacts"]))
    out.print(f"{len(found['artifacts'])} artifacts, {size(found['bytes'])}")


def show_collected(found: Mapping[str, Any]) -> None:
    """Prints what `gc` removed, or would remove."""
    would = "would be " if found["dry_run"] else ""
    for run in found["runs"]:
        out.print(f"run {run} {would}forgotten", soft_wrap=True, markup=False)
    if found["artifacts"]:
        out.print(_artifacts(found["artifacts"]))
    young = f"; {found['young']} that no run wants are too young" if found["young"] else ""
    out.print(
        f"{len(found['artifacts'])} artifacts {would}removed, {size(found['bytes'])}; {found['kept']} kept{young}",
        soft_wrap=True,
    )


def _artifacts(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            row["stage"],
            row["key"],
            f"{row['state']}{' by ' + row['builder'] if row['builder'] else ''}",
            _progress(row),
            size(row["bytes"]),
            ", ".join(row["wanted_by"]) or "no run",
        ]
        for row in rows
    ]
    return plain_table(["stage", "artifact", "state", "made", "size", "wanted by"], cells, "left")


def _progress(row: Mapping[str, Any]) -> str:
    """`12 shards` or `step 800`, and how long ago the last change was where someone works on it."""
    told = [f"{row['shards']:,} shards"] if row["shards"] else []
    told += [f"step {row['step']:,}"] if row["step"] else []
    if row["builder"] and row["changed"]:
        told.append(f"changed {max(0.0, time.time() - row['changed']):.0f} s ago")
    return ", ".join(told)


def checked_lines(checked: Sequence[Checked]) -> Iterator[str]:
    """What `verify` looked at, a line for each stage."""
    for stage in checked:
        line = f"{stage.stage}: {stage.artifacts} {_of(stage.artifacts, 'artifact')}, {stage.files} {_of(stage.files, 'file')}"
        line += f", {size(stage.bytes)}"
        if stage.shards:
            line += f", {stage.shards} {_of(stage.shards, 'shard')} of {stage.samples} samples"
        yield line + (f", {stage.left_out} of them marked as left out" if stage.left_out else "")


def _of(count: int, what: str) -> str:
    return what if count == 1 else f"{what}s"


def size(count: float) -> str:
    """`812 B`, `3.2 MB` or `1.4 TB`, of 1000 each."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def interval(score: Mapping[str, Any]) -> str:
    """`0.74 (0.66 – 0.8)`: a value with its interval."""
    return f"{score['value']:.4g} ({score['low']:.4g} – {score['high']:.4g})"


def difference(held: Mapping[str, Any]) -> str:
    """`+0.1 (+0.05 to +0.15) better`: a paired difference with its interval, where it has one."""
    if held["low"] is None:
        return f"{held['value']:+.4g}"
    return f"{held['value']:+.4g} ({held['low']:+.4g} to {held['high']:+.4g}) {held['verdict']}"


def duration(seconds: float) -> str:
    """`12 s`, `3:05 min` or `2:07 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


class Bars:
    """A progress bar per stage; plain lines where stderr is no terminal. Calls may come from any thread."""

    def __init__(self) -> None:
        self._is_drawn = err.is_terminal and not logs.is_json()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=err,
            disable=not self._is_drawn,
        )
        self._tasks: dict[str, TaskID] = {}
        self._spoken: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, stage: str) -> None:
        """A new stage begins."""
        with self._lock:
            self._tasks[stage] = self._progress.add_task(stage, total=None, count="", note="starting")
            self._spoken[stage] = 0.0
        if not self._is_drawn:
            log.info("%-9s starts", stage, extra={"stage": stage})

    def show(self, stage: str, done: float, total: float, unit: str) -> None:
        """As `update`, of a stage that may not have begun."""
        if stage not in self._tasks:
            self.start(stage)
        self.update(stage, done, total, unit, "")

    def update(self, stage: str, done: float, total: float, unit: str, note: str) -> None:
        """`done` of `total` `unit`s are finished."""
        count = f"{done:,.0f}/{total:,.0f} {unit}"
        with self._lock:
            self._progress.update(
                self._tasks[stage], completed=done, total=total or None, count=count, note=note
            )
            if self._is_drawn or time.monotonic() - self._spoken[stage] < QUIET_SECONDS:
                return
            self._spoken[stage] = time.monotonic()
        log.info("%-9s %s  %s", stage, count, note, extra={"stage": stage})

    def finish(self, stage: str, seconds: float) -> None:
        """A stage has committed its snapshot."""
        with self._lock:
            task = self._tasks[stage]
            total = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
            self._progress.update(task, completed=total, total=total, note="done")
            self._progress.stop_task(task)
        if not self._is_drawn:
            log.info("%-9s done in %s", stage, duration(seconds), extra={"stage": stage})


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Whatever a library prints goes to stderr inside the block, so that stdout holds our JSON alone."""
    held, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = held
