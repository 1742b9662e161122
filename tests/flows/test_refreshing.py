"""A refresh: what grown data cost, what training begins with, and which scores it is held against."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained
from pictures import add_pictures

from data.errors import UserError
from data.stored import name_of, needed, stored
from flows import promoting, refreshing, runs
from flows.comparing import measured_of
from flows.parameters import RefreshParameters
from training.metrics.protocol import differences

SETTINGS = {
    path: [int(n) for n in value.split(",")] if isinstance(value, str) else value
    for path, value in untrained.SETTINGS.items()
    if path != "source.count"
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A root whose production is a run on 60 pictures, and the parameters of its refresh."""
    folder = tmp_path_factory.mktemp("refreshed")
    add_pictures(folder / "pictures", range(60))
    run = RefreshParameters(data=str(folder / "pictures"), root=str(folder / "runs"), settings=SETTINGS)
    name = untrained.finish(run.plan())["run"]
    promoting.promote(run.root, name, force=False)
    return run, runs.find(run.root, name)


def test_a_first_refresh_is_the_whole_recipe(tmp_path):
    run = RefreshParameters(root=str(tmp_path), settings=untrained.SETTINGS | SETTINGS)
    found = refreshing.refresh_of(run)
    assert found.holder is None and found.is_news and found.plan == run.plan()


def test_without_new_data_there_is_nothing_to_do(served):
    run, record = served
    found = refreshing.refresh_of(run)
    assert found.holder == record["run"] and not found.is_news


def test_grown_data_cost_new_shards_and_the_training_that_goes_on(served, monkeypatch):
    run, record = served
    add_pictures(Path(run.data), range(60, 90))
    run = run.model_copy(update={"continued": {"denoiser.max_steps": 7}})
    found = refreshing.refresh_of(run)
    assert found.is_news
    stages = {stage.name: stage for stage in found.plan.stages}
    assert list(stages) == ["shard", "embed", "encode", "prior", "denoiser", "generate", "evaluate", "report"]
    assert stages["shard"].reason == "30 new rows in 1 new shard"
    assert stages["embed"].reason == stages["encode"].reason == "1 new shard"
    assert stages["denoiser"].inputs["start"].folder == record["folders"]["denoiser"]
    assert stages["denoiser"].node.config.max_steps == 7

    new = runs.find(run.root, untrained.finish(found.plan)["run"])
    assert new["external"] == {part: record["folders"][part] for part in ("clip", "vae")}
    wanted = needed(stored(run.root), [name_of(new["folders"]["denoiser"])])
    assert name_of(record["folders"]["clip"]) in wanted
    assert name_of(record["folders"]["denoiser"]) not in wanted, "weights that it began with are used up"

    own, here = measured_of(run.root, found.holder), measured_of(run.root, new["run"])
    assert differences(own["fd_clip"].protocol, here["fd_clip"].protocol), "of other pictures and prompts"

    monkeypatch.setattr(
        runs, "run_stages", lambda plan, pending, **_: [untrained.make(plan, s) for s in pending]
    )
    against = refreshing.holder_scores(found, run)[found.holder]
    assert not any(differences(against[name].protocol, here[name].protocol) for name in here)
    assert against["fd_clip"].protocol.weights["denoiser"] == own["fd_clip"].protocol.weights["denoiser"]
    assert not list(Path(run.root).glob("*/started.json"))


def test_production_of_another_recipe_is_not_refreshed(served):
    run, record = served
    with pytest.raises(UserError, match=f"production is {record['run']}, a run of demo: refresh that recipe"):
        refreshing.refresh_of(run.model_copy(update={"recipe": "unclip"}))
