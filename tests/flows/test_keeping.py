"""A root's keeping: what there is, who wants it, and that nothing wanted is ever removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained

from data import storage
from data.errors import UserError
from data.lease import Owner, lease, this_process
from data.stored import stored
from data.verify import verify
from flows import cli, console, keeping, runs
from training.metrics.tradeoff import Point, Sweep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DAY = 86_400.0


@pytest.fixture
def root(untrained_run, tmp_path) -> Path:
    """A copy of a finished run's root, two days old."""
    copy = tmp_path / "root"
    shutil.copytree(untrained_run[0], copy)
    aged(copy)
    return copy


def aged(folder: Path, days: float = 2.0) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


def orphan(root: Path) -> Path:
    """An artifact that no run names, two days old."""
    made = next((root / "store/generate").iterdir())
    shutil.copytree(made, made.with_name("0123456789ab"))
    aged(made.with_name("0123456789ab"))
    return made.with_name("0123456789ab")


def names(root: Path) -> set[str]:
    return {"/".join(artifact.name) for artifact in stored(str(root))}


def collected(root: Path, **changes) -> dict:
    return keeping.collect(
        str(root), **({"keep_runs": None, "forget": (), "older_than": DAY, "dry_run": False} | changes)
    )


def test_status_tells_each_artifact_and_the_runs_that_want_it(root, untrained_run, capsys):
    run = untrained_run[1]["run"]
    found = keeping.status(str(root))
    assert found["runs"] == [
        {"run": run, "state": "finished", "finished": found["runs"][0]["finished"], "pinned": False}
    ]
    assert {a["stage"] for a in found["artifacts"]} == {s["name"] for s in untrained_run[1]["stages"]}
    assert all(a["state"] == "done" and a["wanted_by"] == [run] for a in found["artifacts"])
    assert sum(a["bytes"] for a in found["artifacts"]) == found["bytes"] > 1e6
    assert cli.main(["status", f"--root={root}"]) == 0
    said = capsys.readouterr().out
    assert run in said and "10 artifacts" in said


def test_the_same_command_writes_a_record_that_was_damaged_anew(root):
    run = keeping.status(str(root))["runs"][0]["run"]
    (root / run / "run.json").write_text("{")
    assert untrained.finish(untrained.plan_of(root))["run"] == run
    assert keeping.status(str(root))["runs"][0]["state"] == "finished"


def test_an_empty_root_says_so(tmp_path, capsys):
    assert cli.main(["status", f"--root={tmp_path}"]) == 0
    assert "holds no run and no artifact" in capsys.readouterr().out
    assert cli.main(["gc", f"--root={tmp_path}"]) == 0
    assert "0 artifacts removed, 0 B; 0 kept" in capsys.readouterr().out


def test_only_what_no_run_wants_goes_and_only_when_it_is_old(root):
    before, lost = names(root), orphan(root)
    assert collected(root, dry_run=True)["artifacts"][0]["key"] == lost.name and lost.exists()
    aged(lost, days=0.5)
    young = collected(root)
    assert (young["artifacts"], young["young"], young["kept"]) == ([], 1, 11) and lost.exists()
    gone = collected(root, older_than=0.0)
    assert [a["key"] for a in gone["artifacts"]] == [lost.name] and gone["bytes"] > 1000
    assert names(root) == before and verify(str(root)).ok
    assert collected(root, older_than=0.0)["artifacts"] == []


@pytest.mark.slow
def test_forgetting_a_run_leaves_what_another_still_wants(root):
    first = keeping.status(str(root))["runs"][0]["run"]
    second = untrained.finish(untrained.plan_of(root, evaluate__guidance_scale=3.0))["run"]
    aged(root)
    assert len(names(root)) == 13
    forgotten = collected(root, keep_runs=1, dry_run=True)
    assert forgotten["runs"] == [first] and len(names(root)) == 13
    assert keeping.pin(str(root), first, pinned=True) == first
    assert collected(root, keep_runs=1)["runs"] == []
    keeping.pin(str(root), first, pinned=False)
    gone = collected(root, keep_runs=1)
    assert [a["stage"] for a in gone["artifacts"]] == ["evaluate", "generate", "report"]
    assert len(names(root)) == 10 and verify(str(root)).ok
    assert runs.find(str(root), "latest")["run"] == second
    assert not untrained.plan_of(root, evaluate__guidance_scale=3.0).pending


@pytest.mark.slow
def test_a_run_that_a_kept_run_is_held_against_stays(root):
    first = keeping.status(str(root))["runs"][0]["run"]
    plan = untrained.plan_of(root, evaluate__guidance_scale=3.0, evaluate__gates=f"not worse than {first}")
    for stage in plan.pending:
        if stage.name != "report":
            untrained.make(plan, stage)
    runs._keep(plan, {"run": plan.run, "stages": [], "report": None}, 1.0)
    assert collected(root, keep_runs=1, dry_run=True)["runs"] == []


def test_the_points_of_a_sweep_stay(root):
    run = keeping.status(str(root))["runs"][0]["run"]
    lost = orphan(root)
    point = Point(setting=3.0, own=False, scores={}, uri=str(lost))
    sweep = Sweep(field="guidance_scale", points=(point,), curves=())
    (root / run / "sweep_guidance_scale.json").write_text(sweep.model_dump_json())
    assert collected(root)["artifacts"] == []


def test_what_a_stopped_run_made_stays_for_its_resuming(root):
    lost = orphan(root)
    note(root, "demo-stopped", lost, stopped())
    assert collected(root)["artifacts"] == []
    assert keeping.status(str(root))["runs"][0]["state"] == "stopped"
    shutil.rmtree(root / "demo-stopped")
    assert len(collected(root)["artifacts"]) == 1


def stopped() -> Owner:
    return this_process().model_copy(update={"pid": 2**22 + 1})


def note(root: Path, run: str, artifact: Path, owner: Owner, **more) -> None:
    (root / run).mkdir()
    record = {"run": run, "folders": {"0": str(artifact)}, "owner": owner.model_dump(mode="json")} | more
    (root / run / "started.json").write_text(json.dumps(record))


def test_nothing_is_removed_while_something_is_made(root):
    lost = orphan(root)
    with lease(str(root / "store/denoiser/ba987654321f")), pytest.raises(UserError, match="is building"):
        collected(root)
    note(root, "demo-running", lost, this_process())
    with pytest.raises(UserError, match="run demo-running is running: nothing was removed"):
        collected(root)
    assert lost.exists()


def test_status_tells_how_far_a_training_is_and_when_it_last_changed(root, capsys, monkeypatch):
    (made,) = (root / "store/denoiser").iterdir()
    (made / "checkpoints" / "step_00000400").mkdir(parents=True)
    (made / "checkpoints" / "step_00001200").mkdir()
    monkeypatch.setattr(console.out, "width", 160)
    with lease(str(made)):
        (row,) = [a for a in keeping.status(str(root))["artifacts"] if a["stage"] == "denoiser"]
        assert (row["state"], row["step"]) == ("being built", 1200)
        cli.main(["status", f"--root={root}"])
    assert re.search(r"step 1,200, changed \d+ s ago", capsys.readouterr().out)


def test_the_rows_of_a_store_are_accounted_for_stage_by_stage(root, monkeypatch, capsys):
    rows = runs.ledgers(untrained.plan_of(root))
    told = {"stage": "shard", "attempted": 60, "written": 60, "filtered": {}, "failed": {}}
    assert [row for row in rows if row["stage"] == "shard"] == [told]
    monkeypatch.setattr(console.out, "width", 160)
    console.out.print(console.ledger_table([told | {"written": 57, "failed": {"truncated": 2, "html": 1}}]))
    assert re.search(r"shard +60 +57 +0 +2 truncated, 1 html", capsys.readouterr().out)


def test_a_run_notes_its_start_and_takes_the_note_back(root, monkeypatch):
    plan = untrained.plan_of(root, evaluate__guidance_scale=3.0)
    names_of_plan = [stage.name for stage in plan.stages]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run_stages", stopped)
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(plan, names=names_of_plan, address="local", verbose=False)
    assert keeping.status(str(root))["runs"][0] == {
        "run": plan.run, "state": "running", "finished": "", "pinned": False,
    }  # fmt: skip
    monkeypatch.setattr(runs, "run_stages", lambda *_, **__: {})
    runs.carry_out(plan, names=names_of_plan, address="local", verbose=False)
    assert not (root / plan.run / "started.json").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"folders": 2}', b"\xff", None])
@pytest.mark.parametrize("name", ["run.json", "started.json", "sweep_x.json", "latest"])
def test_a_record_that_cannot_be_read_stops_everything(root, capsys, name, content):
    run, lost = keeping.status(str(root))["runs"][0]["run"], orphan(root)
    place = root / name if name == "latest" else root / run / name
    place.unlink(missing_ok=True)
    if content is None:
        place.mkdir()
    else:
        place.write_bytes(content)
    if name == "latest" and content not in (b"\xff", None):
        return
    if name == "sweep_x.json" and content is None:
        return
    for command in ("status", "gc"):
        assert cli.main([command, f"--root={root}"]) == 1
        said = capsys.readouterr().err
        assert "cannot be read" in said and said.count("\n") == 1
    assert lost.exists()


def test_a_snapshot_that_cannot_be_read_is_shown_and_stops_gc(root, capsys):
    lost = orphan(root)
    next((lost / "_meta/snapshots").iterdir()).write_text("{")
    assert "damaged" in {a["state"] for a in keeping.status(str(root))["artifacts"]}
    assert cli.main(["gc", f"--root={root}"]) == 2
    said = capsys.readouterr().err
    assert "darkroom verify --repair" in said and said.count("\n") == 1 and lost.exists()


def test_folders_that_are_no_artifacts_are_left_alone(tmp_path):
    (tmp_path / "store/modules/auth").mkdir(parents=True)
    (tmp_path / "store/modules/auth/a.js").write_text("code")
    assert collected(tmp_path, older_than=0.0)["artifacts"] == []
    assert (tmp_path / "store/modules/auth/a.js").exists()


def test_nothing_behind_a_link_is_removed(root, tmp_path):
    shutil.move(root / "store/generate", tmp_path / "generate")
    (root / "store/generate").symlink_to(tmp_path / "generate")
    shutil.rmtree(root / keeping.status(str(root))["runs"][0]["run"])
    before = names(root)
    collected(root, older_than=0.0)
    kept = {name.split("/")[0] for name in names(root)}
    assert "generate" in kept and "denoiser" in kept, "it, and what it was made from"
    assert names(root) < before and {"evaluate", "report"}.isdisjoint(kept)
    (root / "demo-lost").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="is a link that leads nowhere"):
        collected(root)


def test_what_begins_while_gc_works_is_left_alone(root, monkeypatch):
    run = keeping.status(str(root))["runs"][0]["run"]
    shutil.rmtree(root / run)
    removing, removed = keeping.remove, []

    def begins(folder: str) -> None:
        removing(folder)
        removed.append(folder)
        if len(removed) == 1:
            note(root, "demo-new", root / "store/generate" / generated, this_process())

    generated = next((root / "store/generate").iterdir()).name
    monkeypatch.setattr(keeping, "remove", begins)
    aged(root)
    gone = collected(root)
    assert len(gone["artifacts"]) == 9 and names(root) == {f"generate/{generated}"}


def test_a_stopped_run_keeps_the_weights_that_it_was_given(root):
    lost = orphan(root)
    note(root, "prepare-1", root / "store/embed/ffffffffffff", stopped(), external={"clip": str(lost)})
    assert collected(root)["artifacts"] == [] and lost.exists()
    assert collected(root, forget=["prepare-1"])["runs"] == ["prepare-1"]
    assert not (root / "prepare-1").exists() and not lost.exists()


def test_what_a_young_artifact_was_made_from_is_wanted(root):
    run = keeping.status(str(root))["runs"][0]["run"]
    shutil.rmtree(root / run)
    aged(root)
    os.utime(next((root / "store/denoiser").glob("*/_meta/snapshots/*")))
    left = {name.split("/")[0] for name in names(root)} - {
        a["stage"] for a in collected(root, dry_run=True)["artifacts"]
    }
    assert left == {"shard", "clip", "embed", "vae", "encode", "denoiser"}


def test_a_dry_run_writes_nothing(tmp_path):
    assert collected(tmp_path / "nowhere", dry_run=True)["artifacts"] == []
    assert collected(tmp_path / "nowhere")["artifacts"] == []
    assert not (tmp_path / "nowhere").exists()


def test_a_renamed_run_is_pinned_by_the_name_that_it_has(root):
    run = keeping.status(str(root))["runs"][0]["run"]
    (root / run).rename(root / "demo-best")
    assert keeping.pin(str(root), "demo-best", pinned=True) == "demo-best"
    assert (root / "demo-best/pinned").exists() and not (root / run).exists()
    (root / "latest").write_text("demo-best")
    with pytest.raises(UserError, match="--forget demo-best: latest, production or a rollback needs it"):
        collected(root, forget=["demo-best"])


def test_a_removal_that_is_killed_leaves_nothing_that_counts_as_made(root, monkeypatch):
    run = keeping.status(str(root))["runs"][0]["run"]
    shutil.rmtree(root / run)

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "remove_tree", killed)
        collected(root)
    assert [a.name[0] for a in stored(str(root)) if not a.is_done] == ["clip"]
    assert len(collected(root, older_than=0.0)["artifacts"]) == 10 and names(root) == set()


@pytest.mark.parametrize("age", ["7", "d", "-1d", "1w", ""])
def test_an_age_that_cannot_be_read_says_how_to_write_one(age, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["gc", f"--root={tmp_path}", f"--older-than={age}"])
    assert "is no age: write 30m, 12h or 7d" in capsys.readouterr().err
