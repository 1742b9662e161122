"""The pointer `production`: it moves to what is not worse, by paired intervals, and back; its history is kept."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.errors import CorruptArtifact, GateFailed, UserError
from flows import cli, keeping, runs
from flows.promoting import history, promote, rollback
from training.metrics.comparison import Measured
from training.metrics.intervals import Estimate
from training.metrics.protocol import Protocol

NOISE = np.random.default_rng(0).normal(0, 0.05, 64)


def finished(root: Path, run: str, score: float, *, status: str = "ran", prompts: str = "p") -> str:
    """A run's record with a CLIP score around `score`, over the same 64 prompts for every run."""
    folder = root / "store" / "evaluate" / f"{run}00"
    (folder / "_meta/snapshots").mkdir(parents=True)
    found = Estimate.of_mean(score + NOISE)
    row = Measured(
        name="clip_score", value=found.value, low=found.interval[0], high=found.interval[1], n=64, better="higher",
        meaning="", protocol=Protocol(metric="clip_score", n=64, prompts=prompts), deletions=found.deletions,
    )  # fmt: skip
    (folder / "scores.json").write_text(json.dumps({"scores": [row.model_dump(mode="json")]}))
    (root / run).mkdir()
    record = {
        "run": run, "stages": [{"name": "report", "status": status}], "folders": {"evaluate": str(folder)},
        "recipe": {"evaluate": {"gates": []}},
        "finished": f"2026-01-0{len(list(root.iterdir()))}T00:00:00+00:00", "report": None,
    }  # fmt: skip
    (root / run / "run.json").write_text(json.dumps(record))
    return run


def test_it_moves_to_what_is_not_worse_and_stays_where_it_is_otherwise(tmp_path):
    root = str(tmp_path)
    a, b, worse = (finished(tmp_path, *each) for each in (("a", 0.3), ("b", 0.31), ("worse", 0.25)))
    assert promote(root, a, force=False).reason == "nothing was there before"
    moved = promote(root, b, force=False)
    assert (moved.run, moved.replaced) == (b, a) and "clip_score differs by +0.01" in moved.reason
    with pytest.raises(
        GateFailed, match=r"worse is not promoted: not worse than b: clip_score worse by -0.06"
    ):
        promote(root, worse, force=False)
    assert runs.find(root, "production")["run"] == b
    assert promote(root, worse, force=True).reason == "forced"
    assert [move.run for move in history(root)] == [a, b, worse]


def test_going_back_twice_goes_back_two_steps(tmp_path):
    root = str(tmp_path)
    for number, run in enumerate("abc"):
        promote(root, finished(tmp_path, run, 0.3 + number), force=False)
    assert rollback(root).run == "b" and rollback(root).run == "a"
    with pytest.raises(UserError, match="no run served before the present one"):
        rollback(root)
    assert [move.run for move in history(root)] == ["a", "b", "c", "b", "a"]
    assert promote(root, "c", force=False).replaced == "a" and rollback(root).run == "a"
    for run in "bac":
        promote(root, run, force=True)
    assert [rollback(root).run for _ in range(3)] == ["a", "b", "a"], (
        "a run that served twice is no end of the way back"
    )
    with pytest.raises(UserError, match="no run served before"):
        rollback(root)


def test_what_does_not_compare_failed_or_was_not_evaluated_is_refused(tmp_path):
    root = str(tmp_path)
    with pytest.raises(UserError, match="no run served before"):
        rollback(root)
    promote(root, finished(tmp_path, "a", 0.3), force=False)
    finished(tmp_path, "other", 0.4, prompts="q")
    with pytest.raises(GateFailed, match=r"no metric compares .*prompts p and q"):
        promote(root, "other", force=False)
    finished(tmp_path, "failed", 0.5, status="failed")
    with pytest.raises(UserError, match="failed its own gates"):
        promote(root, "failed", force=True)
    with pytest.raises(UserError, match="there is no run 'nowhere'"):
        promote(root, "nowhere", force=True)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UserError, match="run failed has no evaluation"):
        promote(root, "failed", force=True)


def test_the_run_that_serves_outlives_every_gc(tmp_path, capsys):
    root = str(tmp_path)
    promote(root, finished(tmp_path, "a", 0.3), force=False)
    finished(tmp_path, "b", 0.3)
    finished(tmp_path, "c", 0.3)
    assert cli.main(["gc", f"--root={root}", "--keep-runs=1", "--older-than=0s"]) == 0
    assert {run["run"] for run in keeping.status(root)["runs"]} == {"a", "c"}
    promote(root, "c", force=True)
    for late in "def":
        finished(tmp_path, late, 0.3)
    assert cli.main(["gc", f"--root={root}", "--keep-runs=1", "--older-than=0s"]) == 0
    assert {run["run"] for run in keeping.status(root)["runs"]} == {"a", "c", "f"}
    assert rollback(root).run == "a"
    assert cli.main(["status", f"--root={root}"]) == 0
    assert "finished, production" in capsys.readouterr().out
    assert cli.main(["promote", "a", f"--root={root}"]) == 0
    assert "production is a since" in capsys.readouterr().out


def test_a_pointer_that_cannot_be_read_says_what_to_do(tmp_path):
    (tmp_path / "production.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="remove it and promote a run again"):
        runs.find(str(tmp_path), "production")
