"""The flows that are deployed. A schedule, the UI or the API starts them, a worker runs them; each does what a command does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from prefect import Flow, flow, get_run_logger, suspend_flow_run, tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.input import RunInput
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Completed, Failed
from pydantic import Field
from rich.console import Console

from data import storage
from data.errors import NO_PLACE_TO_WRITE, DarkroomError, UserError, no_place
from data.lease import Owner, lease
from data.urls import redacted, refuse_credentials
from flows import artifacts, embedded_prefect, keeping, places, pointers, promoting, refreshing, runs
from flows.parameters import (
    CollectParameters,
    PrepareParameters,
    RefreshParameters,
    RunParameters,
    StoreParameters,
)
from flows.plan import Plan
from stages import cluster, logs

EVALUATION = ("generate", "evaluate", "report")
"""Stages that judge what the stages before them made."""


CANCELLING_SECONDS = 25.0
"""How long a stage may take to keep what it has begun: Prefect's worker kills a cancelled run after 30 seconds."""

TAG = "darkroom"
"""What the automation for lost processes looks for, also on the flow run within the flow run."""


class UnderWay(DarkroomError):
    """Another flow run works on the very run that this one would make, or waits for the word that lets it serve."""


class Approval(RunInput):
    """What a person is asked before production moves."""

    promote: bool = Field(description="let the new run serve")


class _FlowLog(logging.Handler):
    """Hands our log on to the flow run's, from whichever thread it comes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._run_log = get_run_logger()

    def emit(self, record: logging.LogRecord) -> None:
        self._run_log.log(record.levelno, redacted(record.getMessage()))


def _fall_silent(self: Console) -> None:
    """In place of what rich does where nobody reads: exit. A run whose worker was killed goes on; the server has its log."""
    self.quiet = True


def _say_what_resumes(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """A hook: the last word of a run that did not end well, in its own log."""
    flow_run_logger(flow_run, flow).info(
        "the next run of this deployment resumes: finished shards and stages are kept"
    )


_deployed = partial(
    flow,
    persist_result=False,
    on_failure=[_say_what_resumes],
    on_crashed=[_say_what_resumes],
    on_cancellation=[_say_what_resumes],
)


@task(name="reach", persist_result=False, cache_policy=NO_CACHE, retries=3, retry_delay_seconds=[10, 60, 300])
def reach(address: str) -> None:
    """Asks for the cluster at `address`: all that is tried again, since a stage's own troubles are its own to count."""
    if not cluster.answers(address):
        raise UserError(f"address {address}: no Ray cluster answers there; start it, or use local")


@_deployed
def pipeline(run: RunParameters) -> State[Any]:
    """The whole recipe, to its report."""
    return _ended(run, lambda: _carried_out(run.plan(), run.address))


@_deployed
def train(run: RunParameters) -> State[Any]:
    """The recipe until its denoiser is trained."""
    return _ended(run, lambda: _carried_out(run.plan(), run.address, until="denoiser"))


@_deployed
def evaluate(run: RunParameters) -> State[Any]:
    """Pictures, scores and report of a system that is trained already."""
    return _ended(run, lambda: _carried_out(_trained(run.plan()), run.address))


@_deployed
def prepare(run: PrepareParameters) -> State[Any]:
    """Preprocessing alone: new pairs go to new shards, with a column for each encoder given."""
    return _ended(run, lambda: _carried_out(run.plan(), run.address))


@_deployed
def refresh(run: RefreshParameters) -> State[Any]:
    """New data to new shards, training that goes on from the production run's weights, and production for what is not worse."""
    return _ended(run, lambda: _refreshed(run))


@_deployed
def gc(run: CollectParameters) -> State[Any]:
    """What no run wants any more goes."""
    return _ended(run, lambda: _collected(run))


def _ended(asked: StoreParameters, work: Callable[[], str]) -> State[Any]:
    """The state of a run that did `work`, which returns what came of it; an error that says what to do is its message."""
    os.environ.setdefault("DARKROOM_STOPPING_SECONDS", f"{CANCELLING_SECONDS:g}")
    if embedded_prefect.is_within_flow_run():
        Console.on_broken_pipe = _fall_silent
    try:
        log = logs.set_up()
        log.handlers[:] = [*(log.handlers if logs.is_json() else []), _FlowLog()]  # which Prefect prints
        refuse_credentials("", asked.model_dump())
        return Completed(message=work())
    except (UnderWay, keeping.Busy) as error:
        return Cancelled(message=redacted(str(error)))
    except (DarkroomError, FloatingPointError) as error:
        return Failed(message=redacted(str(error)))
    except OSError as error:
        if error.errno not in NO_PLACE_TO_WRITE:
            raise
        return Failed(message=redacted(no_place(error, asked.root)))


def _carried_out(plan: Plan, address: str, *, until: str | None = None) -> str:
    """Carries out `plan` to the stage `until`, with artifacts of whatever was made; returns what it came to, in a line."""
    names = [stage.name for stage in plan.stages]
    names = names[: names.index(until) + 1] if until else names
    places.make_folder(plan.root)
    with _alone(plan):
        artifacts.publish_plan(plan)
        if any(stage.name in names for stage in plan.pending):
            reach(address)
        try:
            with tags(TAG):
                record = runs.carry_out(plan, names=names, address=address, verbose=False)
        except Exception:
            artifacts.publish_outcome(plan)
            raise
        artifacts.publish_outcome(plan)
    return f"{plan.run}: {_told(record['stages'])}"


@contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    """Holds the lease on the run `plan.run`, whichever deployment asks for it. Raises UnderWay where another flow run has it."""

    def give_way(owner: Owner) -> None:
        raise UnderWay(
            f"{plan.run} under {plan.root} is being made by flow run {owner.name} (process {owner.pid} on {owner.host}): "
            "start this one again when that one has ended"
        )

    own = f"{this_run.flow_name}/{this_run.name}"
    with lease(storage.join(plan.root, plan.run), name=own, waiting=give_way):
        yield


def _give_way_to_a_question(root: str) -> None:
    """Raises UnderWay where an earlier refresh of `root` waits for a person's answer: when it has it, it looks for new data itself.

    A flow run that was answered is carried out again from its beginning, and gives way to nobody.
    """
    if this_run.run_count > 1:
        return
    refreshes = FlowFilter.model_validate({"name": {"any_": [this_run.flow_name]}})
    suspended = FlowRunFilter.model_validate({"state": {"name": {"any_": ["Suspended"]}}})
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=refreshes, flow_run_filter=suspended, limit=200, sort="START_TIME_DESC"
        )
        for other in found:
            if other.parameters.get("run", {}).get("root") == root:
                raise UnderWay(
                    f"flow run {other.name} waits for a person's answer before production under {root} moves: "
                    "answer that one, which then looks for new data itself"
                )


def _refreshed(run: RefreshParameters) -> str:
    _give_way_to_a_question(run.root)
    found = refreshing.refresh_of(run)
    plan = found.plan
    if not found.is_news:
        return f"no data that {found.holder} was not trained on: it stays production"
    told = _carried_out(plan, run.address)
    with tags(TAG):
        against = refreshing.holder_scores(found, run)
    reason = promoting.judged(plan.root, plan.run, against=against)
    if run.approval and not _approved(plan, reason, run.approval_hours):
        return f"{told}; not promoted, though it might be ({reason}): a person declined"
    move = promoting.promote(plan.root, plan.run, force=False, against=against)
    artifacts.publish_moves(plan, pointers.history(plan.root))
    return f"{told}; production is {move.run}: {move.reason}"


def _approved(plan: Plan, reason: str, hours: float) -> bool:
    """A person's answer to this very run. The flow ends and begins again when it is there, and finds every stage cached.

    Where data has grown meanwhile, what it trains then is another run, and asked about anew.
    """
    form = Approval.with_initial_data(description=f"Promote **{plan.run}** to production?\n\n{reason}")
    return suspend_flow_run(
        wait_for_input=form, timeout=round(hours * 3600), key=f"promote-{plan.run}"
    ).promote


def _collected(run: CollectParameters) -> str:
    found = keeping.collect(
        places.checked_root(run.root),
        keep_runs=run.keep_runs,
        forget=(),
        older_than=run.older_than_hours * 3600,
        dry_run=run.dry_run,
    )
    artifacts.publish_collected(found)
    would = "would go" if run.dry_run else "went"
    return f"{len(found['artifacts'])} artifacts and {len(found['runs'])} runs {would}; {found['kept']} artifacts are kept"


def _told(stages: Sequence[dict[str, Any]]) -> str:
    ran = [stage["name"] for stage in stages if stage["status"] == "ran"]
    return f"ran {', '.join(ran)}" if ran else "nothing to do, every stage is cached"


def _trained(plan: Plan) -> Plan:
    """`plan`; raises UserError where more of it is pending than its evaluation."""
    if missing := [stage.name for stage in plan.pending if stage.name not in EVALUATION]:
        raise UserError(
            f"{', '.join(missing)} of {plan.run} are not made yet: run the flow train or pipeline first"
        )
    return plan
