"""A schedule that fires by itself and takes pairs to a model that serves; what is trained and evaluated beside it, each by its own
flow; and new pairs that lead to the next one, if it is not worse and a person agrees."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_runs import resume_flow_run

from flows import pointers, serving

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from pictures import add_pictures
from prefect_server import (
    artifacts,
    deploy,
    ended,
    entry,
    eventually,
    free_port,
    runs_of,
    start,
    state,
    talking_to,
)
from untrained import DEPLOYED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ARTIFACTS = ("plan", "ledger", "lineage", "scores", "samples", "report")
STILL = {
    f"{part}.{k}": v for part in ("prior", "denoiser") for k, v in (("max_steps", 1), ("learning_rate", 1e-9))
}
"""A training that goes on and leaves the weights as they are: neither better nor worse."""
SPOILT = STILL | {
    "prior.learning_rate": 1.0, "prior.warmup_steps": 0, "prior.max_steps": 2, "prior.ema_decay": 0.0,
}  # fmt: skip
"""One that leaves no weight of the prior near where it was."""


@dataclass(frozen=True)
class Scheduled:
    """What two schedules of one deployment did."""

    run: FlowRun
    state: Any
    late: list[FlowRun]
    """Runs of either schedule that came while `run` was under way."""
    parameters: dict[str, Any]
    root: str


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    """A refresh of 60 pictures that two schedules start on their own, to its end."""
    folder = tmp_path_factory.mktemp("scheduled")
    root = str(folder / "runs")
    data = add_pictures(folder / "pictures", range(60))
    run = {"recipe": "demo", "data": str(data), "root": root, "settings": DEPLOYED, "continued": STILL}
    schedules = [{"slug": slug, "interval": 20, "active": True} for slug in ("one", "another")]
    with (
        serving.server(folder / "prefect", free_port()) as (url, _),
        talking_to(url),
        serving.worker(folder / "prefect", url, "darkroom"),
    ):
        deploy(folder, entry("refresh", "darkroom", run, *schedules))
        first = eventually(
            lambda: next((r for r in runs_of("refresh/darkroom") if r.state.is_running()), None)
        )
        eventually(lambda: any(r.state.is_cancelled() for r in runs_of("refresh/darkroom")))
        deploy(folder, entry("refresh", "darkroom", run))  # the schedules end, the run goes on
        late = [r for r in runs_of("refresh/darkroom") if r.state.is_cancelled()]
        yield Scheduled(first, ended(first, 2400), late, run, root)


def test_a_schedule_takes_pairs_to_a_run_that_serves(scheduled):
    assert scheduled.run.auto_scheduled
    assert scheduled.state.name == "Completed", scheduled.state.message
    (move,) = pointers.history(scheduled.root)
    assert scheduled.state.message.endswith(f"production is {move.run}: nothing was there before")
    assert pointers.pointed(scheduled.root) == {"latest": move.run, "production": move.run}


def test_what_another_schedule_starts_meanwhile_is_cancelled(scheduled):
    assert {run.state.message for run in scheduled.late} == {"Deployment concurrency limit reached."}


def test_a_run_leaves_its_artifacts(scheduled):
    left, (move,) = artifacts(scheduled.run), pointers.history(scheduled.root)
    assert set(left) == {f"demo-{name}" for name in ARTIFACTS} | {"production"}
    assert [row["status"] for row in json.loads(left["demo-plan"])] == ["pending"] * 10
    assert "| fd_clip ↓ |" in left["demo-scores"] and "**" + move.run in left["demo-scores"]
    assert left["demo-samples"].startswith("data:image/png;base64,")
    assert (
        left["demo-report"]
        == f"[{scheduled.root}/{move.run}/report.html](file://{scheduled.root}/{move.run}/report.html)"
    )
    assert "| denoiser |" in left["demo-lineage"]
    assert json.loads(left["production"])[0]["run"] == move.run


def test_a_recipe_is_trained_evaluated_and_found_whole_by_a_flow_each(scheduled):
    (move,) = pointers.history(scheduled.root)
    other = scheduled.parameters | {"settings": DEPLOYED | {"denoiser.seed": 1}}
    del other["continued"]
    flows = ("train", "evaluate", "pipeline")
    deploy(Path(scheduled.root).parent, *(entry(flow, "another", other) for flow in flows))
    early = ended(start("evaluate/another"))
    assert early.name == "Failed" and early.message.startswith("denoiser of demo-")
    assert early.message.endswith(" are not made yet: run the flow train or pipeline first")

    training = start("train/another")
    trained = ended(training)
    assert trained.name == "Completed", trained.message
    run = trained.message.removesuffix(": ran denoiser")
    assert set(artifacts(training)) == {"demo-plan", "demo-ledger", "demo-lineage"}

    evaluated = start("evaluate/another")
    assert ended(evaluated).message == f"{run}: ran generate, evaluate, report"
    scores = artifacts(evaluated)["demo-scores"]
    assert f"**{run}**" in scores and run != move.run
    (distance,) = [line for line in scores.splitlines() if line.startswith("| fd_clip ↓ |")]
    *_, trend, earlier, _ = [cell.strip() for cell in distance.split("|")]
    assert earlier == "1" and sorted(trend) == ["▁", "█"], "the run that serves, and this one"

    whole = start("pipeline/another")
    assert ended(whole).message == f"{run}: nothing to do, every stage is cached"
    assert set(artifacts(whole)) == {f"demo-{name}" for name in ARTIFACTS}
    assert pointers.pointed(scheduled.root) == {"latest": run, "production": move.run}


def asked(scheduled: Scheduled) -> FlowRun:
    """A refresh that asks a person, at the point where it waits for the answer."""
    run = start("refresh/darkroom", scheduled.parameters | {"approval": True})
    with get_client(sync_client=True) as client:
        eventually(lambda: (s := state(run, client)).is_paused() or s.is_final(), 2400)
        assert state(run, client).name == "Suspended", state(run, client)
    return run


def test_production_stays_where_a_person_declines_or_does_not_answer(scheduled):
    (before,) = pointers.history(scheduled.root)
    nothing = ended(start("refresh/darkroom"))
    assert nothing.message == f"no data that {before.run} was not trained on: it stays production"

    add_pictures(Path(scheduled.parameters["data"]), range(60, 90))
    run = asked(scheduled)
    assert pointers.history(scheduled.root) == (before,), "asked first"
    meanwhile = ended(start("refresh/darkroom"))
    assert meanwhile.name == "Cancelled"
    assert meanwhile.message.startswith(f"flow run {run.name} waits for a person's answer before production")
    made = json.loads(artifacts(run)["demo-plan"])
    again = ["shard", "embed", "encode", "prior", "denoiser", "generate", "evaluate", "report"]
    assert [(row["stage"], row["status"]) for row in made] == [(stage, "pending") for stage in again]
    resume_flow_run(run.id, run_input={"promote": False})
    declined = ended(run)
    assert declined.name == "Completed", declined.message
    assert f"not promoted, though it might be (not worse than {before.run}: " in declined.message
    assert declined.message.endswith("): a person declined")

    unanswered = ended(
        start("refresh/darkroom", scheduled.parameters | {"approval": True, "approval_hours": 0.001})
    )
    assert unanswered.name == "Failed" and unanswered.message == "The flow was paused and never resumed."
    assert pointers.history(scheduled.root) == (before,)


def test_a_refresh_that_made_a_worse_system_fails_with_the_reason_and_production_stays(scheduled):
    before = pointers.history(scheduled.root)
    run = start("refresh/darkroom", scheduled.parameters | {"continued": SPOILT})
    failed = ended(run, 2400)
    assert failed.name == "Failed"
    made = pointers.pointed(scheduled.root)["latest"]
    assert failed.message.startswith(f"{made} is not promoted: not worse than {before[-1].run}: ")
    assert "prior_cosine worse by -" in failed.message
    assert pointers.history(scheduled.root) == before
    assert "| prior_cosine ↑ |" in artifacts(run)["demo-scores"], "to look at what became of it"


def test_new_pairs_lead_to_a_run_that_serves_when_a_person_agrees(scheduled):
    (before,) = pointers.history(scheduled.root)
    run = asked(scheduled)
    assert pointers.history(scheduled.root) == (before,), "asked anew"
    resume_flow_run(run.id, run_input={"promote": True})
    after = ended(run)
    assert after.name == "Completed", after.message
    assert "nothing to do, every stage is cached" in after.message, "what it asked about was done"
    (_, move) = pointers.history(scheduled.root)
    assert move.replaced == before.run and f"not worse than {before.run}: " in move.reason
