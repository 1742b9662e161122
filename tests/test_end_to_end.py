"""The promises of the README, kept by the real command line: real Prefect, real Ray, real files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_lines import CHECKOUT, TINY, command, environment, result
from ray_cluster import ray_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STAGES = ["shard", "clip", "embed", "vae", "encode", "prior", "denoiser", "generate", "evaluate", "report"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict]:
    """A tiny demo that nothing disturbed, by two workers per fan-out: (root, what `run --json` printed)."""
    root = tmp_path_factory.mktemp("undisturbed")
    settings = TINY | {"fanout.num_workers": 2, "prices.cpu_hour": 0.5, "prices.currency": "EUR"}
    line = command("run", "demo", "--json", root=root, settings=settings)
    finished = subprocess.run(
        line, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=900
    )
    return root, result(finished)


def columns_of(root: Path) -> dict[str, str]:
    """relative path -> SHA-256 of every shard, embedding, latent and encoder weight under `root`."""
    wanted = [p for s in ("shard", "clip", "embed", "vae", "encode") for p in (root / "store" / s).rglob("*")]
    kept = [
        p
        for p in wanted
        if p.suffix in (".tar", ".parquet", ".npy", ".safetensors")
        and not {"_source", "_meta"} & set(p.parts)
    ]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept if p.is_file()}


def test_a_run_ends_with_a_report_and_a_sound_store(undisturbed):
    root, printed = undisturbed
    assert [stage["name"] for stage in printed["stages"]] == STAGES
    assert {stage["status"] for stage in printed["stages"]} == {"ran"}
    assert set(printed) == {"run", "root", "stages", "metrics", "report"}
    assert {
        "prompt_accuracy",
        "prompt_accuracy_heldout",
        "fd_clip",
        "cmmd",
        "clip_score",
        "vae_psnr",
        "vae_ssim",
        "prior_cosine",
    } == set(printed["metrics"])
    page = Path(printed["report"]).read_text()
    spent = [
        json.loads(path.read_bytes())["device_seconds"]
        for path in root.glob("store/*/*/_meta/snapshots/*.json")
    ]
    assert sum(s.get("cpu", 0) > 0 for s in spent) == len(STAGES) - 1, "all but the report held devices"
    assert re.search(r"<dd>[\d.]+ CPU-hours, [\d.]+ EUR</dd>", page)
    assert "http://" not in page.replace("http://www.w3.org", "") and "data:image/png;base64" in page
    verdict = subprocess.run(
        [sys.executable, "-m", "flows.cli", "verify", str(root), "--json"],
        env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result(verdict) == {
        "ok": True, "attempted": 240, "written": 240, "filtered": 0, "failed": 0, "problems": [],
    }  # fmt: skip


def test_a_second_run_does_nothing_but_say_so_in_seconds(undisturbed, darkroom):
    root, printed = undisturbed
    before = {path: path.stat().st_mtime_ns for path in (root / "store").rglob("*") if path.is_file()}
    started = time.monotonic()
    again = result(darkroom("run", "demo", "--json", root=root, settings=TINY))
    assert time.monotonic() - started < 20
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert again["metrics"] == printed["metrics"] and again["report"] == printed["report"]
    assert {path: path.stat().st_mtime_ns for path in (root / "store").rglob("*") if path.is_file()} == before


def test_a_changed_setting_makes_its_stage_and_what_follows_pending_and_says_why(undisturbed, darkroom):
    root, _ = undisturbed
    plan = result(
        darkroom("plan", "demo", "--json", root=root, settings=TINY | {"denoiser.learning_rate": 1e-3 / 7})
    )
    pending = {stage["name"]: stage["reason"] for stage in plan["stages"] if stage["status"] == "pending"}
    assert list(pending) == ["denoiser", "generate", "evaluate", "report"]
    assert pending["denoiser"].startswith("denoiser.learning_rate changed (")
    assert pending["generate"] == "denoiser changed"


def test_published_encoders_prepare_another_folder_alone(undisturbed, darkroom, tmp_path):
    _, printed = undisturbed
    uri = {stage["name"]: stage["uri"] for stage in printed["stages"]}
    pictures = next((Path(uri["shard"]) / "_source").glob("shapes-*"))
    settings = {
        "clip.pretrained": uri["clip"],
        "vae.pretrained": uri["vae"],
        "shard.image_size": 32,
        "source.limit": 50,
    }
    prepared = result(darkroom("prepare", str(pictures), "--json", root=tmp_path, settings=settings))
    assert [stage["name"] for stage in prepared["stages"]] == ["shard", "embed", "encode"]
    assert prepared["metrics"] == {} and prepared["report"] is None
    names = {p.name for stage in prepared["stages"] for p in Path(stage["uri"]).rglob("*") if p.is_file()}
    assert {
        "00000.tar",
        "img_emb_00000.npy",
        "text_emb_00000.npy",
        "metadata_00000.parquet",
        "vae_moments_00000.npy",
    } <= names


def test_as_jobs_on_two_nodes_the_recipe_ends_with_the_same_scores_and_then_does_nothing(
    undisturbed, tmp_path, prefect_api
):
    with ray_cluster() as cluster:
        cluster.start_head(num_cpus=1)
        cluster.add_node(num_cpus=1)
        settings = TINY | {"fanout.num_workers": 2}
        line = command("run", "demo", "--json", f"--address={cluster.http}", root=tmp_path, settings=settings)
        variables = environment() | cluster.client | {"PREFECT_API_URL": prefect_api}
        made, again = (
            result(
                subprocess.run(
                    line, env=variables, cwd=CHECKOUT, capture_output=True, text=True, timeout=1200
                )
            )
            for _ in range(2)
        )
        jobs = sorted(cluster.jobs().values(), key=lambda job: job["start_time"])
    assert {stage["status"] for stage in made["stages"]} == {"ran"}
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert [job["submission_id"].partition("-")[0] for job in jobs] == STAGES
    assert {job["status"] for job in jobs} == {"SUCCEEDED"}
    root, alone = undisturbed
    assert columns_of(tmp_path) == columns_of(root)
    assert made["metrics"] == again["metrics"] == alone["metrics"]
    assert "CPU-hours" in Path(made["report"]).read_text()


def test_generate_draws_the_same_picture_for_the_same_seed(undisturbed, tmp_path, darkroom):
    root, _ = undisturbed
    pictures = []
    for name in ("a", "b"):
        drawn = darkroom(
            "generate",
            "latest",
            "a large red star",
            "--count=2",
            "--steps=2",
            f"--out={tmp_path / name}",
            root=root,
        )
        assert drawn.returncode == 0, drawn.stderr
        pictures.append([Path(line).read_bytes() for line in drawn.stdout.split()])
    assert pictures[0] == pictures[1] and pictures[0][0] != pictures[0][1]


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param(("shard", "clip", "generate"), id="one of each kind"),
        pytest.param(STAGES[:-1], id="every stage", marks=pytest.mark.faults),
    ],
)
def test_killed_in_stage_after_stage_the_same_command_ends_with_the_same_bytes(undisturbed, tmp_path, stages):
    """SIGKILL of the whole process group at the first sign of progress of each stage in turn, then one last run."""
    root = tmp_path / "killed"
    line = command("run", "demo", "--json", root=root, settings=TINY)
    finished_early: dict[Path, int] = {}
    for stage in stages:
        _kill_during(stage, line, root)
        for path, written in finished_early.items():
            assert path.stat().st_mtime_ns == written, f"{path} was made twice"
        finished_early |= {
            p: p.stat().st_mtime_ns for p in (root / "store").glob("*/*/_meta/snapshots/*.json")
        }
        finished_early |= {
            p: p.stat().st_mtime_ns for p in (root / "store/shard").rglob("*.tar") if p.name[0] != "."
        }
    last = subprocess.run(line, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=900)
    printed = result(last)
    assert printed["stages"][0]["status"] == "cached"
    assert columns_of(root) == columns_of(undisturbed[0])
    assert printed["metrics"] == undisturbed[1]["metrics"]


def _kill_during(stage: str, line: list[str], root: Path) -> None:
    """Starts the run and kills it once `stage` has written a receipt or a checkpoint; fails when it never does."""
    signs = (f"store/{stage}/*/_meta/receipts/0*.json", f"store/{stage}/*/checkpoints/step_*")
    with subprocess.Popen(
        line,
        env=environment(),
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        deadline = time.monotonic() + 300
        while not any(list(root.glob(sign)) for sign in signs):
            assert time.monotonic() < deadline, f"{stage} made no progress"
            assert running.poll() is None, f"the run ended before {stage} made progress"
            time.sleep(0.02)
        os.killpg(running.pid, signal.SIGKILL)
    time.sleep(1.0)


def test_the_spec_of_a_stage_runs_by_itself(tmp_path):
    from flows.assignments import edited
    from flows.graph import unclip_nodes
    from flows.plan import make_plan
    from flows.recipes import find
    from flows.runs import spec_of

    recipe = edited(find("demo"), [f"{path}={value}" for path, value in TINY.items()])
    plan = make_plan(recipe, unclip_nodes(recipe), str(tmp_path))
    spec = tmp_path / "spec.json"
    spec.write_text(spec_of(plan, plan.stages[0]).model_dump_json())
    line = [sys.executable, "-m", "stages", str(spec)]
    finished = subprocess.run(
        line, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert (Path(plan.stages[0].folder) / "00002.tar").is_file()
    shutil.rmtree(tmp_path / "store")
    spec.write_text(json.dumps({"stage": "shard"}))
    assert (
        subprocess.run(line, env=environment(), cwd=CHECKOUT, capture_output=True, timeout=300).returncode
        == 2
    )
