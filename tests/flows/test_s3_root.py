"""A root in an object store: every command answers as it does for one on a disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained
from object_store import ObjectStore

from data import storage
from data.lease import lease
from data.manifest import load_snapshot
from data.stored import stored
from flows import cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture
def root(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a run of untrained networks is made, with a cache of its own."""
    monkeypatch.setenv("DARKROOM_CACHE", str(tmp_path / "cache"))
    return f"{bucket}/deep/root"


def said(capsys, *line: str, root: str, code: int = 0) -> str:
    assert cli.main([*line, f"--root={root}"]) == code
    return capsys.readouterr().out


def told(capsys, *line: str, root: str) -> dict:
    return json.loads(said(capsys, *line, "--json", root=root))


def test_a_run_is_made_told_kept_promoted_and_drawn_with(root, tmp_path, capsys):
    first = untrained.finish(untrained.plan_of(root))["run"]
    assert not untrained.plan_of(root).pending
    second = untrained.finish(untrained.plan_of(root, evaluate__guidance_scale=3.0))["run"]
    status = told(capsys, "status", root=root)
    assert [(r["run"], r["state"]) for r in status["runs"]] in (
        [(first, "finished"), (second, "finished")],
        [(second, "finished"), (first, "finished")],
    )
    assert len(status["artifacts"]) == 13 and all(a["state"] == "done" for a in status["artifacts"])
    assert status["pointers"] == {"latest": second}
    said(capsys, "promote", first, root=root)
    assert f"production is {second}" in said(capsys, "promote", second, "--force", root=root)
    assert f"production is {first}" in said(capsys, "rollback", root=root)
    assert told(capsys, "lineage", second, root=root)["tops"][0].startswith("report/")
    assert told(capsys, "diff", first, second, root=root)["data"]["shared_shards"] == 2
    assert said(capsys, "report", first, root=root) == f"{root}/{first}/report.html\n"
    drawn = said(capsys, "generate", first, "a star", f"--out={tmp_path}", root=root).split()
    assert [Path(path).suffix for path in drawn] == [".png"]
    assert cli.main(["verify", root]) == 0


def test_gc_counts_what_goes_and_removes_it_lease_and_all(root, capsys):
    run = untrained.finish(untrained.plan_of(root))["run"]
    storage.remove_tree(f"{root}/{run}")
    storage.remove(f"{root}/latest")
    before = {artifact.name for artifact in stored(root)}
    found = told(capsys, "gc", "--dry-run", "--older-than=0s", root=root)
    assert len(found["artifacts"]) == len(before) == 10
    with lease(f"{root}/store/denoiser/other"):
        assert cli.main(["gc", f"--root={root}"]) == 2
    assert "is building" in capsys.readouterr().err
    assert told(capsys, "gc", "--dry-run", root=root)["young"] == 10
    said(capsys, "gc", "--older-than=0s", root=root)
    assert list(stored(root)) == [] and storage.list_tree(f"{root}/store") == []


def test_what_is_committed_is_found_by_name_before_a_listing_shows_it(root, object_store: ObjectStore):
    object_store.lag = 3600.0
    plan = untrained.plan_of(root)
    made = untrained.make(plan, plan.pending[0])
    assert storage.list_folders(f"{root}/store") == [], "no listing shows it"
    assert load_snapshot(made.folder, made.fingerprint) == made
    again = untrained.plan_of(root)
    assert again.stages[0].status == "cached" and again.stages[1].status == "pending"


def test_a_bucket_that_is_not_there_is_one_sentence(bucket, capsys):
    for line in (["run", "demo"], ["status"], ["gc", "--dry-run"], ["pin", "x"], ["promote", "x"]):
        assert cli.main([*line, f"--root={bucket}-absent/runs"]) == 2
        said = capsys.readouterr().err
        assert "pictures-absent" in said and said.count("\n") == 1, line
