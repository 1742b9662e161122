"""A whole run left to a job of a cluster: its head carries the recipe out, and nobody has to wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data import storage
from data.errors import UserError
from flows.plan import Plan
from stages.contract import STOP_SECONDS
from stages.jobs import adopt_or_submit, connect, is_job_server, request

PREFECT_SECONDS = 30
"""What the flow may take to end after the stage that was stopped."""


def submit(plan: Plan, recipe: str, assignments: Sequence[str], address: str, *, retry_failed: bool) -> str:
    """The id of the job that carries `plan` out on the cluster at `address`, submitted now or under way already.

    It is `darkroom run` with the recipe, data, root and settings of the plan, attached to its own cluster. Raises UserError
    where no job server answers.
    """
    if not is_job_server(address):
        raise UserError(
            f"--address {address}: a run is submitted to a job server; give http://HOST:8265 of a head"
        )
    line = ["-m", "flows.cli", "run", recipe, f"--root={plan.root}", "--address=auto"]
    if plan.recipe.source.path:
        line.append(f"--data={plan.recipe.source.path}")
    line += [f"--set={_absolute(assignment)}" for assignment in assignments]
    line += ["--retry-failed"] if retry_failed else []
    wanted = request(
        storage.join(plan.root, plan.run), line, plan.recipe.jobs, STOP_SECONDS + PREFECT_SECONDS
    )
    return adopt_or_submit(connect(address), plan.run, plan.run, wanted, plan.recipe.jobs)


def _absolute(assignment: str) -> str:
    """`PATH=VALUE`, a value that names something here made absolute: the job starts in another folder."""
    path, _, value = assignment.partition("=")
    place = Path(value.strip()).expanduser()
    is_place = value.strip().startswith((".", "~")) or "/" in value
    return f"{path}={place.resolve()}" if is_place and place.exists() else assignment
