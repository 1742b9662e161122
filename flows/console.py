"""What people see: tables on the terminal, a progress bar per stage on stderr, one quiet logger."""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
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

from flows.plan import Plan

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)
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
)
QUIET_SECONDS = 15.0
"""Without a terminal, at most one line of progress per stage in this time."""


def set_up_logging(*, verbose: bool) -> None:
    """One handler on stderr; the libraries speak only with `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.simplefilter("ignore")
        for name in NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


def plan_table(plan: Plan) -> Table:
    """The stages, what is cached, what will run and why, with an estimate."""
    table = Table(
        title=f"{plan.recipe.name} → {plan.run}", title_justify="left", header_style="bold", pad_edge=False
    )
    for name, justify in (
        ("stage", "left"),
        ("status", "left"),
        ("time", "right"),
        ("why", "left"),
        ("fingerprint", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for stage in plan.stages:
        colour = "green" if stage.status == "cached" else "yellow"
        seconds = (
            "?"
            if stage.seconds is None
            else f"{'~' if stage.status == 'pending' else ''}{duration(stage.seconds)}"
        )
        table.add_row(
            stage.name, f"[{colour}]{stage.status}[/]", seconds, stage.reason, f"[dim]{stage.fingerprint}[/]"
        )
    known = [s.seconds for s in plan.pending if s.seconds is not None]
    total = f"about {duration(sum(known))}" if known else "time unknown"
    missing = len(plan.pending) - len(known)
    table.caption = (
        f"{len(plan.pending)} of {len(plan.stages)} stages to run, {total}{f' and {missing} without an estimate' if known and missing else ''}"
        if plan.pending
        else "everything is cached"
    )
    table.caption_justify = "left"
    return table


def scores_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """Every headline number with its 95 % interval."""
    table = Table(header_style="bold", pad_edge=False)
    for name, justify in (
        ("score", "left"),
        ("value", "right"),
        ("95 % interval", "right"),
        ("n", "right"),
        ("meaning", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for score in scores:
        interval = f"{score['low']:.4g} – {score['high']:.4g}"
        better = "↑" if score["better"] == "higher" else "↓"
        table.add_row(
            f"{score['name']} {better}", f"{score['value']:.4g}", interval, str(score["n"]), score["meaning"]
        )
    return table


def duration(seconds: float) -> str:
    """`12 s`, `3:05 min` or `2:07 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"


class Bars:
    """A progress bar per stage; plain lines where stderr is no terminal. Calls may come from any thread."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=err,
            disable=not err.is_terminal,
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
        if not err.is_terminal:
            log.info("%-9s starts", stage)

    def update(self, stage: str, done: float, total: float, unit: str, note: str) -> None:
        """`done` of `total` `unit`s are finished."""
        count = f"{done:,.0f}/{total:,.0f} {unit}"
        with self._lock:
            self._progress.update(
                self._tasks[stage], completed=done, total=total or None, count=count, note=note
            )
            if err.is_terminal or time.monotonic() - self._spoken[stage] < QUIET_SECONDS:
                return
            self._spoken[stage] = time.monotonic()
        log.info("%-9s %s  %s", stage, count, note)

    def finish(self, stage: str, seconds: float) -> None:
        """A stage has committed its snapshot."""
        with self._lock:
            task = self._tasks[stage]
            total = self._progress.tasks[self._progress.task_ids.index(task)].total or 1
            self._progress.update(task, completed=total, total=total, note="done")
            self._progress.stop_task(task)
        if not err.is_terminal:
            log.info("%-9s done in %s", stage, duration(seconds))


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Whatever a library prints goes to stderr inside the block, so that stdout holds our JSON alone."""
    held, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = held
