"""A plan is a pure reading of the store: what is cached, what is pending, and why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.manifest import FileRecord, ShardRecord, publish_receipt, publish_snapshot, snapshot_path
from stages import continuation
from training import checkpoint_facts

CHECKOUT = Path(__file__).parents[2]
AFTER_DENOISER = ["denoiser", "generate", "evaluate", "report"]


def reasons(plan) -> dict[str, str]:
    return {stage.name: stage.reason for stage in plan.pending}


def test_planning_imports_neither_ray_nor_prefect(tmp_path):
    program = (
        "import sys; from flows.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ', '.join({'ray', 'prefect'} & set(sys.modules)) or 0)"
    )
    line = [sys.executable, "-c", program, "plan", "demo", f"--root={tmp_path}"]
    finished = subprocess.run(line, cwd=CHECKOUT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert list(tmp_path.iterdir()) == [], "a plan leaves nothing behind"


def test_an_empty_store_has_nothing_cached(plan_of):
    plan = plan_of()
    assert set(reasons(plan).values()) == {"not made yet"} and len(plan.pending) == 10


def test_a_full_store_has_nothing_pending(plan_of, publish):
    publish(plan_of().stages)
    plan = plan_of()
    assert plan.pending == ()
    assert {stage.spending.seconds for stage in plan.stages} == {100.0}


def test_a_plan_is_a_function_of_its_recipe(plan_of):
    first, second = plan_of(), plan_of()
    assert [s.fingerprint for s in first.stages] == [s.fingerprint for s in second.stages]
    assert all(re.fullmatch("[0-9a-f]{12}", stage.fingerprint) for stage in first.stages)
    assert first.run == f"demo-{first.stages[-1].fingerprint[:8]}"


def test_a_changed_setting_makes_its_stage_and_what_follows_pending_and_says_why(plan_of, publish):
    publish(plan_of().stages)
    found = reasons(plan_of("denoiser.learning_rate=0.0123"))
    assert list(found) == AFTER_DENOISER
    assert re.fullmatch(r"denoiser\.learning_rate changed \(\S+ → 0\.0123\)", found["denoiser"])
    assert found["generate"] == found["evaluate"].split(",")[0] == "denoiser changed"


def test_each_reason_names_the_path_that_a_user_would_set(plan_of, publish):
    publish(plan_of().stages)
    assert reasons(plan_of("evaluate.guidance_scale=9"))["generate"].startswith(
        "evaluate.guidance_scale changed ("
    )
    assert reasons(plan_of("shard.image_size=64"))["shard"].startswith("shard.image_size changed (32 → 64)")
    assert "the source's content changed" in reasons(plan_of("source.count=50"))["shard"]
    assert reasons(plan_of("prior.num_layers=9"))["evaluate"].split(", ")[0] == "prior changed"


def test_how_a_run_is_carried_out_is_no_part_of_its_identity(plan_of, publish):
    publish(plan_of().stages)
    how = ("fanout.num_workers=7", "denoiser.num_workers=4", "clip.checkpoint_every=1", "vae.fsdp=true")
    assert plan_of(*how).pending == ()


def test_a_stage_is_made_again_with_what_follows_when_its_snapshot_is_lost(plan_of, publish):
    publish(plan_of().stages)
    prior = next(stage for stage in plan_of().stages if stage.name == "prior")
    Path(snapshot_path(prior.folder, prior.fingerprint)).unlink()
    assert reasons(plan_of()) == {
        "prior": "not made yet",
        "generate": "prior is made again",
        "evaluate": "prior is made again",
        "report": "prior is made again",
    }


def test_a_damaged_manifest_is_pending_and_says_so(plan_of, publish):
    publish(plan_of().stages)
    report = plan_of().stages[-1]
    Path(snapshot_path(report.folder, report.fingerprint)).write_text("{")
    assert reasons(plan_of()) == {"report": "its manifest is damaged"}


def test_unfinished_work_says_where_it_resumes(plan_of):
    shard, clip = plan_of().stages[:2]
    for index in range(2):
        publish_receipt(shard.folder, ShardRecord(index=index, samples=1, keys="", files=()))
    for step in (200, 1400):
        Path(clip.folder, "checkpoints", f"step_{step:08d}").mkdir(parents=True)
    found = reasons(plan_of())
    assert found["shard"] == "resumes after 2 finished shards"
    assert found["clip"] == "resumes at step 1,400"


def _checkpoint(stage, digests: dict[str, str], clock: int) -> None:
    """A checkpoint as a training of `stage` leaves it, without its tensors."""
    config = stage.node.config
    identity = continuation.trajectory(stage.name, stage.node.stage.version, config, digests)
    folder = Path(stage.folder, "checkpoints", f"step_{clock:08d}")
    folder.mkdir(parents=True)
    facts = {"identity": identity, "clock": clock, "max_steps": config.max_steps}
    (folder / "state.json").write_text(json.dumps({**facts, "digest": checkpoint_facts.digest(facts)}))


def test_a_longer_training_with_a_constant_rate_continues_a_shorter_one(plan_of, publish):
    constant = "vae.schedule=constant"
    short = plan_of(constant, "vae.max_steps=300").stages
    made = publish(short)
    vae = next(stage for stage in short if stage.name == "vae")
    for clock in (200, 300):
        _checkpoint(vae, {"data": made["shard"].digest}, clock)
    found = reasons(plan_of(constant, "vae.max_steps=500"))
    assert found["vae"] == f"continues from step 200 of {vae.fingerprint}", (
        "300 was its end, and closed its curve"
    )
    assert reasons(plan_of(constant, "vae.max_steps=150"))["vae"] == "vae.max_steps changed (300 → 150)"
    other = reasons(plan_of(constant, "vae.max_steps=500", "vae.learning_rate=0.5"))
    assert other["vae"].startswith("vae.learning_rate changed (")


def test_with_a_cosine_schedule_a_longer_training_starts_anew_and_the_plan_says_why(plan_of, publish):
    publish(plan_of("vae.max_steps=300").stages)
    assert reasons(plan_of("vae.max_steps=500"))["vae"] == (
        "vae.max_steps changed (300 → 500), and a cosine schedule depends on it: trains anew"
    )


def test_the_estimate_of_a_changed_stage_scales_the_last_timing_with_its_steps(plan_of, publish):
    plan = plan_of("denoiser.max_steps=100")
    publish(plan.stages)
    longer = {stage.name: stage.spending for stage in plan_of("denoiser.max_steps=300").pending}
    assert longer["denoiser"].seconds == pytest.approx(300.0)
    assert longer["denoiser"].device_seconds == pytest.approx({"cpu": 540.0})
    assert longer["generate"].seconds == pytest.approx(100.0)


def test_bytes_are_estimated_by_images_and_not_by_steps(plan_of, publish):
    made = publish(plan_of("evaluate.num_images=300", "denoiser.max_steps=100").stages)
    for stage in ("generate", "denoiser"):
        file = FileRecord(path="a", bytes=2_000_000, sha256="0" * 64)
        publish_snapshot(made[stage].folder, made[stage].model_copy(update={"files": (file,)}))
    changed = plan_of("evaluate.num_images=900", "denoiser.max_steps=300").pending
    expected = {stage.name: stage.spending.bytes for stage in changed}
    assert (expected["generate"], expected["denoiser"]) == (6_000_000, 2_000_000)


def test_what_a_stage_will_spend_is_unknown_until_one_like_it_was_made(plan_of, publish):
    assert {bool(stage.spending.device_seconds) for stage in plan_of().stages} == {False}
    publish(plan_of().stages)
    row = plan_of("evaluate.num_images=900").stages[-3].as_json()
    assert row["name"] == "generate" and row["status"] == "pending"
    assert row["device_seconds"] == pytest.approx({"cpu": 360.0}) and row["seconds"] == pytest.approx(200.0)


def test_the_nearest_artifact_explains_the_change(plan_of, publish):
    publish(plan_of("denoiser.learning_rate=0.5", "denoiser.max_steps=77").stages)
    publish(plan_of("denoiser.learning_rate=0.5").stages)
    found = reasons(plan_of("denoiser.learning_rate=0.25"))
    assert found["denoiser"] == "denoiser.learning_rate changed (0.5 → 0.25)"
