"""A plan as people see it: what is cached, what will run and why, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from flows import console
from flows.console import duration, size
from flows.estimates import Spending, total
from flows.plan import Plan, PlannedStage
from stages.spending import PricesConfig, hours

SPENDING_WIDTH = 130
"""Columns of a terminal from which on devices, bytes and money have columns of their own."""


def show_plan(plan: Plan, stages: Sequence[PlannedStage]) -> None:
    """Prints the `stages` of a plan, what is to run, and the weights that come from elsewhere."""
    pending = [stage for stage in stages if stage.status == "pending"]
    console.out.print(f"{plan.recipe.name} → {plan.run}", soft_wrap=True)
    console.out.print(plan_table(stages, plan.recipe.prices))
    if pending:
        expected = _expected([stage.spending for stage in pending], plan.recipe.prices)
        console.out.print(f"{len(pending)} of {len(stages)} stages to run{expected}", soft_wrap=True)
    else:
        console.out.print("everything is cached")
    for kind, source in {
        ref.stage: ref.folder for s in stages for ref in s.inputs.values() if ref.external
    }.items():
        place = (
            ""
            if Path(source).is_dir()
            else " (downloaded when the run starts, unless this machine has it already)"
        )
        console.out.print(f"{kind} weights: {source}{place}", soft_wrap=True, markup=False)


def _expected(spendings: Sequence[Spending], prices: PricesConfig) -> str:
    """`, about 12:04 min, 0.35 CPU-hours, 130 MB, 0.02 USD`: what is to be expected of stages, as far as that is known."""
    without = sum(spending.seconds is None for spending in spendings)
    if without == len(spendings):
        return ""
    whole = total(spendings)
    parts = [f"about {duration(whole.seconds or 0.0)}"]
    parts += [hours(whole.device_seconds)] if whole.device_seconds else []
    parts += [size(whole.bytes)] if whole.bytes else []
    parts += filter(None, [prices.told(whole.device_seconds)])
    return ", " + ", ".join(parts) + (f", and {without} without an estimate" if without else "")


def plan_table(stages: Sequence[PlannedStage], prices: PricesConfig) -> Table:
    """The stages, what is cached, what will run and why, with an estimate where there is one.

    Devices, bytes and money have columns where any is known and the terminal is wide enough; their sums are told below.
    """
    wide = console.out.width >= SPENDING_WIDTH
    shown: list[tuple[str, Callable[[Spending], str]]] = [
        ("time", lambda s: "?" if s.seconds is None else duration(s.seconds)),
    ]
    if wide:
        shown += [
            ("devices", lambda s: hours(s.device_seconds)),
            ("size", lambda s: size(s.bytes) if s.bytes else ""),
            ("cost", lambda s: prices.told(s.device_seconds)),
        ]
    cells = {name: [cell(stage.spending) for stage in stages] for name, cell in shown}
    cells = {name: column for name, column in cells.items() if set(column) - {"", "?"}}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for name in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("fingerprint", no_wrap=True, style="dim")
    for row, stage in enumerate(stages):
        colour = "green" if stage.status == "cached" else "yellow"
        about = "~" if stage.status == "pending" else ""
        spent = [
            about + cell if (cell := column[row]) not in ("", "?") else cell for column in cells.values()
        ]
        table.add_row(
            stage.name, f"[{colour}]{stage.status}[/]", *spent, escape(stage.reason), stage.fingerprint
        )
    return table
