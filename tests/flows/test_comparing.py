"""`darkroom compare`: runs side by side under one protocol, and a refusal that says where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flows import cli
from training.metrics.comparison import Measured
from training.metrics.intervals import Estimate
from training.metrics.protocol import Protocol

NOISE = np.random.default_rng(0).normal(size=64)


def score(name: str, mean: float, **protocol) -> Measured:
    values = mean + NOISE
    fields = {"metric": name, "n": 64, "guidance_scale": 2.0, "weights": {"denoiser": str(mean)}} | protocol
    return Measured(
        name=name, value=float(values.mean()), low=mean - 1, high=mean + 1, n=64, better="higher", meaning="",
        protocol=Protocol(**fields), deletions=Estimate.of_mean(values).deletions,
    )  # fmt: skip


def run_with(root: Path, name: str, *scores: Measured) -> None:
    folder = root / "store" / "evaluate" / name
    for place in (folder, root / name):
        place.mkdir(parents=True)
    document = {"scores": [row.model_dump(mode="json") for row in scores]}
    (folder / "scores.json").write_text(json.dumps(document))
    (root / name / "run.json").write_text(
        json.dumps({"run": name, "folders": {"evaluate": str(folder)}, "report": None})
    )


def test_runs_stand_side_by_side_with_the_paired_interval_of_their_difference(tmp_path, capsys):
    run_with(tmp_path, "a", score("clip_score", 0.5))
    run_with(tmp_path, "b", score("clip_score", 0.6))
    assert cli.main(["compare", "a", "b", "--json", f"--root={tmp_path}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["runs"] == ["a", "b"] and printed["incomparable"] == []
    (row,) = printed["metrics"]
    held = row["against_first"]["b"]
    assert held["verdict"] == "better", "the shared noise cancels, though each interval holds the other"
    assert (held["value"], held["low"], held["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert cli.main(["compare", "a", "b", f"--root={tmp_path}"]) == 0
    assert "better" in capsys.readouterr().out


def test_two_protocols_are_refused_by_name_and_place(tmp_path, capsys):
    run_with(tmp_path, "a", score("clip_score", 0.5))
    run_with(tmp_path, "b", score("clip_score", 0.6, guidance_scale=3.0))
    assert cli.main(["compare", "a", "b", f"--root={tmp_path}"]) == 2
    assert "clip_score (guidance_scale 2.0 and 3.0)" in capsys.readouterr().err
    vary = ["compare", "a", "b", f"--root={tmp_path}", "--json"]
    assert cli.main([*vary, "--vary=guidance_scale"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"][0]["against_first"]["b"]["verdict"] == "better"
    assert cli.main([*vary, "--vary=guidance"]) == 2
    assert "a protocol has no guidance" in capsys.readouterr().err


def test_what_compares_is_shown_and_what_does_not_stands_apart_with_its_reasons(tmp_path, capsys):
    run_with(tmp_path, "a", score("clip_score", 0.5), score("fid", 9.0, resize="tf1"))
    run_with(tmp_path, "b", score("clip_score", 0.6), score("fid", 8.0, resize="clean"))
    line = ["compare", "a", "b", f"--root={tmp_path}"]
    assert cli.main([*line, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in printed["metrics"]] == ["clip_score"]
    (row,) = printed["incomparable"]
    assert row["differences"] == ["resize tf1 and clean"] and "against_first" not in row
    assert cli.main(line) == 0
    assert "fid: resize tf1 and clean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a"], "compare needs at least two runs"),
        (["a", "a"], "a run is named twice"),
        (["a", "c"], "run c has no evaluation"),
        (["a", "nowhere"], "there is no run 'nowhere'"),
        (["a", "d"], "a and d have no score in common"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, capsys, names, sentence):
    run_with(tmp_path, "a", score("clip_score", 0.5))
    run_with(tmp_path, "d", score("fid", 0.5))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text(json.dumps({"run": "c", "folders": {}}))
    assert cli.main(["compare", *names, f"--root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
