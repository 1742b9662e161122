"""The pointer `production`: it moves to what is not worse, by paired intervals, and back; its history is kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_lines import CHECKOUT, environment

from data.errors import GateFailed, UserError
from flows import cli, keeping, runs
from flows.pointers import history
from flows.promoting import promote, rollback
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


def test_under_a_root_that_was_moved_what_lies_there_now_is_compared_and_promoted(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    a, b = finished(tmp_path / "old", "a", 0.3), finished(tmp_path / "old", "b", 0.31)
    root = str((tmp_path / "old").rename(tmp_path / "new"))
    assert promote(root, a, force=False).run == a and promote(root, b, force=False).replaced == a
    assert cli.main(["compare", a, b, f"--root={root}"]) == 0
    assert "clip_score" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"scores": 3}', '{"scores": [{"name": "clip_score", "protocol": 3}]}']
)
def test_scores_that_cannot_be_read_are_one_sentence(tmp_path, content, capsys):
    run = finished(tmp_path, "a", 0.3)
    (tmp_path / "store/evaluate/a00/scores.json").write_text(content)
    assert cli.main(["promote", run, f"--root={tmp_path}"]) == 1
    assert capsys.readouterr().err == (
        f"darkroom: {tmp_path}/store/evaluate/a00/scores.json holds no scores: run `darkroom verify --repair "
        f"{tmp_path}/store/evaluate/a00`\n"
    )


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


MOVE = '{"run": "a", "at": "", "replaced": null, "reason": ""}'
TORN = f'{{"moves": [{MOVE}, {{"run": "b", "at": "2026-01-0'
GOES_BACK_TO_NOTHING = f'{{"moves": [{MOVE}, {MOVE[:-1]}, "is_rollback": true}}]}}'


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", "\0" * 64, '{"moves": []}', '{"moves": [3]}', '{"moves": [{"run": "a"}]}', TORN,
        GOES_BACK_TO_NOTHING, '{"moves": ' + "[" * 100_000, f'{{"moves": [{MOVE}], "command": "rm"}}', None,
    ],
)  # fmt: skip
def test_a_pointer_that_cannot_be_read_is_one_sentence_and_is_left_as_it_is(tmp_path, content, capsys):
    run, place = finished(tmp_path, "a", 0.3), tmp_path / "production.json"
    if content is None:
        place.mkdir()
    else:
        place.write_text(content)
    for line in (
        ["promote", run],
        ["promote", run, "--force"],
        ["rollback"],
        ["status"],
        ["gc", "--keep-runs=1"],
    ):
        assert cli.main([*line, f"--root={tmp_path}"]) == 1
        said = capsys.readouterr().err
        assert said == f"darkroom: {place} cannot be read: remove it and promote a run again\n"
    if content is not None:
        assert place.read_text() == content
        place.unlink()
        assert cli.main(["promote", run, f"--root={tmp_path}"]) == 0


@pytest.mark.parametrize("name", ["../../etc", "/etc/passwd", "gone", "a\nb"])
def test_a_pointer_to_what_is_no_run_here_leads_nowhere(tmp_path, name):
    run = finished(tmp_path, "a", 0.3)
    move = json.loads(MOVE) | {"run": name}
    (tmp_path / "production.json").write_text(json.dumps({"moves": [move]}))
    with pytest.raises(UserError, match="there is no run"):
        runs.find(str(tmp_path), "production")
    with pytest.raises(UserError, match="there is no run"):
        promote(str(tmp_path), run, force=False)
    assert cli.main(["gc", f"--root={tmp_path}", "--keep-runs=1", "--older-than=0s"]) == 0
    assert promote(str(tmp_path), run, force=True).replaced == name
    assert runs.find(str(tmp_path), "production")["run"] == run


def test_a_run_that_gc_forgets_meanwhile_is_not_promoted(tmp_path, monkeypatch, caplog):
    root, forgetting = str(tmp_path), keeping._forget
    oldest, *_ = [finished(tmp_path, run, 0.3) for run in "abc"]
    with ThreadPoolExecutor(1) as beside:
        promotion: list[Future] = []

        def forget(folder: str) -> None:
            promotion.append(beside.submit(promote, root, oldest, force=False))
            while "waiting for process" not in caplog.text and not promotion[0].done():
                time.sleep(0.02)
            forgetting(folder)

        monkeypatch.setattr(keeping, "_forget", forget)
        gone = keeping.collect(root, keep_runs=2, forget=(), older_than=60.0, dry_run=False)
    assert gone["runs"] == [oldest]
    with pytest.raises(UserError, match="there is no run 'a'"):
        promotion[0].result()
    assert history(root) == ()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_promotions_at_once_follow_each_other(tmp_path):
    for run in "ab":
        finished(tmp_path, run, 0.3)
    with runs.keeping(str(tmp_path)):
        both = [
            subprocess.Popen(
                [sys.executable, "-m", "flows.cli", "promote", run, f"--root={tmp_path}"],
                cwd=CHECKOUT, env=environment(), stderr=subprocess.PIPE, text=True,
            )
            for run in "ab"
        ]  # fmt: skip
        for process in both:
            assert process.stderr and any("waiting for process" in line for line in process.stderr)
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    first, second = history(str(tmp_path))
    assert {first.run, second.run} == {"a", "b"} and (first.replaced, second.replaced) == (None, first.run)
