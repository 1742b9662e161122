"""`darkroom evaluate --sweep` and gates, on a finished run: nothing is generated twice, and nothing failed is promoted."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained

from data.errors import UserError
from flows import cli, runs
from flows.sweeping import parsed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def root(untrained_run, tmp_path) -> Path:
    """A finished run of its own, under a place of its own."""
    shutil.copytree(untrained_run[0], tmp_path / "root")
    plan = untrained.plan_of(tmp_path / "root")
    runs.carry_out(plan, names=[s.name for s in plan.stages], address="local", verbose=False)
    runs._keep(plan, {"run": plan.run, "root": plan.root, "stages": [], **runs._outcome(plan)}, 1.0)
    return tmp_path / "root"


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Stages run in this process instead of on Ray under Prefect; their names, in order."""
    names: list[str] = []

    def run_stages(plan, pending, *, address, verbose):  # noqa: ARG001
        names.extend(stage.name for stage in pending)
        return {stage.name: untrained.make(plan, stage).seconds for stage in pending}

    monkeypatch.setattr(runs, "run_stages", run_stages)
    return names


def settings(**more: str) -> list[str]:
    changed = untrained.SETTINGS | {path.replace("__", "."): value for path, value in more.items()}
    return [f"--set={path}={value}" for path, value in changed.items()]


@pytest.mark.slow
def test_a_sweep_makes_what_is_not_there_and_nothing_twice(root, made, capsys):
    line = ["evaluate", "latest", f"--root={root}", "--json", "--sweep"]
    assert cli.main([*line, "guidance_scale=1,4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert made == ["generate", "evaluate"] * 2 and printed["made"] == 2
    assert [(p["setting"], p["own"]) for p in printed["points"]] == [(1, False), (2, True), (4, False)]
    own = json.loads((root / printed["run"] / "run.json").read_text())["folders"]["evaluate"]
    assert printed["points"][1]["uri"] == own and len({p["uri"] for p in printed["points"]}) == 3
    (curve,) = printed["curves"]
    assert curve["distance"] == "fd_clip" and curve["best"] in curve["pareto"]

    assert cli.main([*line, "guidance_scale=4,1,3"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["made"] == 1 and [p["setting"] for p in again["points"]] == [1, 2, 3, 4]
    assert [p for p in again["points"] if p["setting"] != 3] == printed["points"]


@pytest.mark.slow
def test_samplers_are_swept_by_name_with_a_front(root, made, capsys):
    assert (
        cli.main(["evaluate", "latest", f"--root={root}", "--json", "--sweep", "sampler=ddim,dpm_solver"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert made == ["generate", "evaluate"]
    assert [(p["setting"], p["own"]) for p in printed["points"]] == [("ddim", False), ("dpm_solver", True)]
    first, second = (point["scores"]["fd_clip"][0] for point in printed["points"])
    assert first == pytest.approx(second, rel=1e-4), (
        "in two steps, a first and a last one, DPM-Solver++ is DDIM"
    )
    assert printed["points"][0]["uri"] != printed["points"][1]["uri"]
    assert {row for curve in printed["curves"] for row in curve["pareto"]} <= {"ddim", "dpm_solver"}


@pytest.mark.slow
def test_the_curve_is_data_and_a_picture_on_the_page(root, made, capsys):
    assert cli.main(["evaluate", "latest", f"--root={root}", "--sweep=num_inference_steps=1,2"]) == 0
    table = capsys.readouterr().out
    assert "the run's own" in table and "best fd_clip" in table
    assert made == ["generate", "evaluate"]
    run = root / (root / "latest").read_text()
    kept = json.loads((run / "sweep_num_inference_steps.json").read_text())
    assert [point["setting"] for point in kept["points"]] == [1, 2]
    rows = pq.read_table(run / "sweep_num_inference_steps.parquet").to_pylist()
    assert {row["metric"] for row in rows} >= {"fd_clip", "clip_score"} and rows[0]["setting"] == "1"
    page = (run / "report.html").read_text()
    assert 'id="tradeoff"' in page and page.count('class="ring"') == 1 and "num_inference_steps = " in page


@pytest.mark.slow
def test_seeds_are_swept_for_what_chance_does(root, made, capsys):
    line = ["evaluate", "latest", f"--root={root}", "--sweep=seed=0,1"]
    assert cli.main([*line, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert made == ["generate", "evaluate"] and printed["curves"] == []
    values = [point["scores"]["fd_clip"][0] for point in printed["points"]]
    assert printed["spread"]["fd_clip"] == pytest.approx([np.mean(values), np.std(values, ddof=1)])
    assert "vae_psnr" not in printed["spread"], "no seed of generation is in it"
    assert cli.main(line) == 0
    assert "between seeds" in capsys.readouterr().out
    page = (root / printed["run"] / "report.html").read_text()
    assert "drawn from seeds 0, 1" in page and '<th scope="row">fd_clip</th>' in page


@pytest.mark.slow
def test_what_the_run_has_switched_off_is_a_point_too(root, made, capsys):
    line = ["evaluate", "latest", f"--root={root}", "--sweep=threshold_percentile=99.5"]
    assert cli.main([*line, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert made == ["generate", "evaluate"]
    assert [(point["setting"], point["own"]) for point in points] == [("none", True), (99.5, False)]


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ("guidance=1,2", "did you mean guidance_scale? it has guidance_scale"),
        ("denoiser.max_steps=1", "sampling has no such setting"),
        ("guidance_scale", "has no values: write guidance_scale=V1,V2"),
        ("guidance_scale=", "has no values"),
        ("guidance_scale=1,-2", "--sweep guidance_scale=-2: input should be greater than or equal to 0"),
        ("guidance_interval=0,500", "sampling has no such setting"),
        (
            "threshold_percentile=none,101",
            "threshold_percentile=101: input should be less than or equal to 100",
        ),
        ("seed=none", "--sweep seed=None: input should be a valid integer"),
        ("num_inference_steps=1.5", "--sweep num_inference_steps=1.5: input should be a valid integer"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(sweep, sentence):
    with pytest.raises(UserError) as refused:
        parsed(sweep)
    assert sentence in str(refused.value)


@pytest.mark.slow
def test_a_sweep_of_a_run_whose_parts_are_gone_says_which(root, made, capsys):
    shutil.rmtree(root / "store" / "denoiser")
    assert cli.main(["evaluate", "latest", f"--root={root}", "--sweep=guidance_scale=1"]) == 2
    assert "denoiser would be made again" in capsys.readouterr().err and made == []


@pytest.mark.slow
def test_a_failed_gate_ends_the_run_after_its_report_and_promotes_nothing(root, made, capsys):
    before = (root / "latest").read_text()
    line = ["run", "demo", f"--root={root}"]
    failing = settings(evaluate__gates="vae_psnr >= 99, clip_score <= 1")
    assert cli.main([*line, *failing]) == 1
    error = capsys.readouterr().err
    assert "gate `vae_psnr >= 99` failed: vae_psnr is 1" in error and "95 % interval" in error
    assert "clip_score" not in error and made == ["report"]
    page = Path(error.split("the report is ")[1].strip())
    assert "✕ failed" in page.read_text() and "✓ holds" in page.read_text()
    assert (root / "latest").read_text() == before and page.parent.name != before
    assert cli.main([*line, *failing]) == 1, "a failed gate stays failed"
    assert made == ["report"] * 2
    assert cli.main(["compare", before, page.parent.name, f"--root={root}"]) == 0


@pytest.mark.slow
def test_gates_that_hold_let_the_run_stand_and_not_worse_is_paired(root, made):
    baseline = (root / "latest").read_text()
    gates = settings(evaluate__gates=f"vae_psnr >= 1, not worse than {baseline}")
    assert cli.main(["run", "demo", f"--root={root}", *gates]) == 0
    assert made == ["report"] and (root / "latest").read_text() != baseline
    assert cli.main(["run", "demo", f"--root={root}", *gates]) == 0
    assert made == ["report"], "judged once: nothing is pending"


@pytest.mark.slow
def test_a_gate_against_a_run_that_is_not_there_is_refused_before_anything_starts(root, made, capsys):
    gates = settings(evaluate__gates="not worse than demo-none")
    assert cli.main(["plan", "demo", f"--root={root}", *gates]) == 2
    assert "there is no run 'demo-none'" in capsys.readouterr().err and made == []


@pytest.mark.slow
def test_a_sweep_and_a_failed_gate_on_real_ray_and_prefect(root, darkroom):
    swept = darkroom("evaluate", "latest", "--sweep=guidance_scale=1", "--json", root=root)
    assert swept.returncode == 0, swept.stderr[-2000:]
    assert json.loads(swept.stdout)["made"] == 1 and swept.stdout.count("\n") == 1
    before = (root / "latest").read_text()
    failed = darkroom("run", "demo", *settings(evaluate__gates="vae_psnr >= 99"), root=root)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert (
        "darkroom: gate `vae_psnr >= 99` failed" in failed.stderr and (root / "latest").read_text() == before
    )
