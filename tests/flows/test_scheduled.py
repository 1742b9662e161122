"""A schedule that fires by itself and takes pairs to a model that serves; and new pairs to the next one, if a person agrees."""

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

from flows import promoting, runs, serving

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
TRAININGS = ("clip", "vae", "prior", "denoiser")
SETTINGS = (
    {
        path: [int(n) for n in value.split(",")] if isinstance(value, str) else value
        for path, value in untrained.SETTINGS.items()
        if path != "source.count"
    }
    | {
        f"{training}.{name}": value
        for training in TRAININGS
        for name, value in (("max_steps", 2), ("batch_size", 8), ("num_workers", 1))
    }
    | {"fanout.num_workers": 1}
)
STILL = {
    f"{part}.{k}": v for part in ("prior", "denoiser") for k, v in (("max_steps", 1), ("learning_rate", 1e-9))
}
"""A training that goes on and leaves the weights as they are: neither better nor worse."""


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
    run = {"recipe": "demo", "data": str(data), "root": root, "settings": SETTINGS, "continued": STILL}
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
    (move,) = promoting.history(scheduled.root)
    assert scheduled.state.message.endswith(f"production is {move.run}: nothing was there before")
    assert runs.pointed(scheduled.root) == {"latest": move.run, "production": move.run}


def test_what_another_schedule_starts_meanwhile_is_cancelled(scheduled):
    assert {run.state.message for run in scheduled.late} == {"Deployment concurrency limit reached."}


def test_a_run_leaves_its_artifacts(scheduled):
    left, (move,) = artifacts(scheduled.run), promoting.history(scheduled.root)
    named = ("plan", "ledger", "lineage", "scores", "samples", "report")
    assert set(left) == {f"demo-{name}" for name in named} | {"production"}
    assert [row["status"] for row in json.loads(left["demo-plan"])] == ["pending"] * 10
    assert "| fd_clip ↓ |" in left["demo-scores"] and "**" + move.run in left["demo-scores"]
    assert left["demo-samples"].startswith("data:image/png;base64,")
    assert (
        left["demo-report"]
        == f"[{scheduled.root}/{move.run}/report.html](file://{scheduled.root}/{move.run}/report.html)"
    )
    assert "| denoiser |" in left["demo-lineage"]
    assert json.loads(left["production"])[0]["run"] == move.run


def test_new_pairs_lead_to_a_run_that_serves_when_a_person_agrees(scheduled):
    (before,) = promoting.history(scheduled.root)
    nothing = ended(start("refresh/darkroom"))
    assert nothing.message == f"no data that {before.run} was not trained on: it stays production"

    add_pictures(Path(scheduled.parameters["data"]), range(60, 90))
    run = start("refresh/darkroom", scheduled.parameters | {"approval": True})
    with get_client(sync_client=True) as client:
        eventually(lambda: (s := state(run, client)).is_paused() or s.is_final(), 2400)
        assert state(run, client).name == "Suspended", state(run, client)
    assert promoting.history(scheduled.root) == (before,), "asked first"
    resume_flow_run(run.id, run_input={"promote": True})
    after = ended(run)
    assert after.name == "Completed", after.message
    assert "nothing to do, every stage is cached" in after.message, "what it asked about was done"
    (_, move) = promoting.history(scheduled.root)
    assert move.replaced == before.run and f"not worse than {before.run}: " in move.reason
    made = json.loads(artifacts(run)["demo-plan"])
    assert [row["stage"] for row in made] == [
        "shard",
        "embed",
        "encode",
        "prior",
        "denoiser",
        "generate",
        "evaluate",
        "report",
    ]
