"""Evaluation: the same bits whoever computes which block, and a protocol with every value."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[1]))
import untrained

from data.errors import StageFailed
from data.manifest import Snapshot
from flows import runs
from stages import evaluate, generate
from stages.contract import FanoutConfig, Inputs, Workspace
from stages.fanout import finished
from training.metrics import extractors
from training.metrics.frechet import Gaussian, frechet_distance
from training.metrics.moments import accumulate_here
from training.metrics.neighbours import neighbours
from training.metrics.protocol import Protocol

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
BLOCK = 6
"""Small enough that 26 images make five blocks, the last one of two."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> Iterator[None]:
    """Blocks of six, the one thread that a worker has, and moments without Ray."""
    monkeypatch.setattr(generate, "BLOCK", BLOCK)
    monkeypatch.setattr(evaluate, "BLOCK", BLOCK)
    monkeypatch.setattr(evaluate, "accumulate_on_cluster", accumulate_here)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def dealt_to(workers: int):
    """`map_shards` without Ray: tasks dealt in reverse order to `workers` that each load the system for themselves."""

    def deal(work, arguments, tasks, workspace):
        hands = [work(**arguments) for _ in range(workers)]
        records = {
            task.index: untrained.written(hands[at % workers](task, workspace.folder))
            for at, task in enumerate(reversed(tasks))
        }
        return tuple(records[task.index] for task in tasks)

    return deal


def evaluated(root: Path, out: Path, fan_out, monkeypatch, **changes) -> dict[str, str]:
    """Generates and evaluates the run under `out`; relative path -> SHA-256 of every image block, feature and score."""
    plan = untrained.plan_of(root, **changes)
    stages = {stage.name: runs.spec_of(plan, stage) for stage in plan.stages}
    inputs: dict[str, Snapshot] = {}
    for module in (generate, evaluate):
        name = module.STAGE.name
        monkeypatch.setattr(module, "map_shards", fan_out)
        opened: Inputs = {r: inputs.get(ref.stage) or ref.open() for r, ref in stages[name].inputs.items()}
        workspace = Workspace(str(out / name), stages[name].fingerprint, FanoutConfig(num_workers=2))
        config = module.STAGE.config.model_validate(stages[name].config)
        inputs[name] = module.STAGE.run(config, opened, workspace)
    files = [p for p in out.rglob("*") if p.suffix in (".npy", ".png") or p.name == "scores.json"]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_every_bit_is_the_same_for_any_number_of_workers(untrained_run, dinov2_folder, tmp_path, monkeypatch):
    asked = {"evaluate__dinov2": dinov2_folder}
    alone = evaluated(untrained_run[0], tmp_path / "alone", untrained.inline, monkeypatch, **asked)
    for workers in (2, 3, 8):
        out = tmp_path / f"dealt to {workers}"
        assert evaluated(untrained_run[0], out, dealt_to(workers), monkeypatch, **asked) == alone, workers
    assert len([name for name in alone if name.startswith("generate/generated/")]) == 5
    assert len([name for name in alone if "dinov2" in name]) == 5 + 10, (
        "blocks of generated and real pictures"
    )


@pytest.mark.slow
def test_inceptions_metrics_too_have_the_same_bits(untrained_run, inception_weights, tmp_path, monkeypatch):
    asked = {
        "evaluate__inception": inception_weights,
        "evaluate__inception_is_custom": True,
        "evaluate__num_images": 8,
        "evaluate__reference_images": 8,
        "evaluate__reconstruction_images": 3,
    }
    alone = evaluated(untrained_run[0], tmp_path / "alone", untrained.inline, monkeypatch, **asked)
    assert evaluated(untrained_run[0], tmp_path / "dealt", dealt_to(3), monkeypatch, **asked) == alone
    scores = json.loads((tmp_path / "alone/evaluate/scores.json").read_text())["scores"]
    named = {"fid", "kid", "precision", "recall", "density", "coverage", "inception_score", "vae_rfid"}
    assert named <= {score["name"] for score in scores}


def test_a_clip_for_all_runs_looks_and_reads_in_place_of_the_runs_own(untrained_run, tmp_path, monkeypatch):
    """Here it is the run's own once more, by its folder: the same cosines, under a protocol that other runs can share."""
    root = untrained_run[0]
    clip = next(stage.folder for stage in untrained.plan_of(root).stages if stage.name == "clip")
    evaluated(root, tmp_path / "own", untrained.inline, monkeypatch)
    evaluated(root, tmp_path / "common", untrained.inline, monkeypatch, evaluate__clip=clip)
    own, common = (
        {
            row["name"]: row
            for row in json.loads((tmp_path / name / "evaluate/scores.json").read_text())["scores"]
        }
        for name in ("own", "common")
    )
    for name in ("clip_score", "fd_clip", "cmmd"):
        half = pytest.approx(
            own[name]["value"], rel=1e-3
        )  # the precision in which the run's own embeddings are stored
        assert common[name]["value"] == half
        assert common[name]["protocol"]["extractor_digest"] == extractors.digest_of("clip", clip)
        assert own[name]["protocol"]["extractor_digest"] != common[name]["protocol"]["extractor_digest"]
    assert common["prior_cosine"] == own["prior_cosine"]
    assert len(list((tmp_path / "common/evaluate/clip_text").glob("*.npy"))) == 5
    assert not (tmp_path / "common/evaluate/text_emb").exists()


def test_pictures_of_one_prompt_share_a_block_of_every_interval(untrained_run, tmp_path, monkeypatch):
    evaluated(untrained_run[0], tmp_path, untrained.inline, monkeypatch, evaluate__images_per_prompt=2)
    rows = json.loads((tmp_path / "evaluate/scores.json").read_text())["scores"]
    drawn = [row for row in rows if row["protocol"]["images_per_prompt"] == 2]
    assert {"fd_clip", "cmmd", "clip_score", "prompt_accuracy"} <= {row["name"] for row in drawn}
    assert all(size % 2 == 0 for row in drawn for size in row["deletions"]["sizes"])
    assert [row["deletions"]["sizes"] for row in drawn if row["name"] == "clip_score"] == [[2] * 13]


def test_the_tail_is_neither_dropped_nor_repeated(untrained_run, tmp_path, monkeypatch):
    evaluated(untrained_run[0], tmp_path, untrained.inline, monkeypatch)
    blocks = sorted((tmp_path / "generate" / "generated").glob("*.npy"))
    assert [len(np.load(path)) for path in blocks] == [6, 6, 6, 6, 2]
    prompts = (tmp_path / "generate" / "_meta" / "prompts.jsonl").read_text().splitlines()
    assert len(prompts) == 26
    n = {s["name"]: s["n"] for s in json.loads((tmp_path / "evaluate/scores.json").read_text())["scores"]}
    assert n["fd_clip"] == n["clip_score"] == 26 and n["vae_psnr"] == 20
    assert n["prompt_accuracy"] + n["prompt_accuracy_heldout"] == 26


def test_fewer_images_than_dimensions_are_said_as_score_says_it(untrained_run, tmp_path, monkeypatch, caplog):
    plan = untrained.plan_of(untrained_run[0], evaluate__reference_images=9)
    spec = next(runs.spec_of(plan, stage) for stage in plan.stages if stage.name == "evaluate")
    monkeypatch.setattr(evaluate, "map_shards", untrained.inline)
    config = evaluate.EvaluateConfig.model_validate(spec.config)
    inputs = {role: ref.open() for role, ref in spec.inputs.items()}
    evaluate.run(config, inputs, Workspace(str(tmp_path / "out"), spec.fingerprint))
    said = json.loads((tmp_path / "out" / "scores.json").read_text())["warnings"]
    assert [line.split(":")[0] for line in said] == ["9 images for the 16 dimensions of clip"]
    assert said[0] in caplog.text


def test_every_value_carries_its_protocol(untrained_run):
    plan = untrained.plan_of(untrained_run[0])
    made = {stage.name: stage.snapshot for stage in plan.stages}
    assert made["evaluate"] is not None and made["generate"] is not None
    rows = json.loads((Path(made["evaluate"].folder) / "scores.json").read_text())["scores"]
    protocols = {row["name"]: Protocol.model_validate(row["protocol"]) for row in rows}
    fd = protocols["fd_clip"]
    assert (fd.extractor, fd.extractor_digest, fd.n) == ("clip", made["clip"].digest, 26)
    assert (fd.reference, fd.reference_n) == (made["shard"].digest, 60)
    assert fd.weights == {part: made[part].digest for part in ("clip", "vae", "prior", "denoiser")}
    assert (fd.seeds, fd.sampler, fd.num_inference_steps, fd.guidance_scale) == ((0,), "dpm_solver", 2, 2.0)
    assert fd.ema is True and fd.sampling["noise_level"] == 100 and "guidance_scale" not in fd.sampling
    manifest = (Path(made["generate"].folder) / "_meta" / "prompts.jsonl").read_bytes()
    assert fd.prompts == hashlib.sha256(manifest).hexdigest()
    assert protocols["prompt_accuracy"].reference == "" and protocols["vae_psnr"].prompts == ""
    assert protocols["vae_psnr"].weights == {"vae": made["vae"].digest}
    assert all(protocol.metric == name for name, protocol in protocols.items())


def test_features_that_hold_nan_are_one_sentence(untrained_run, tmp_path, monkeypatch):
    def poisoned(work, arguments, tasks, workspace):
        records = untrained.inline(work, arguments, tasks, workspace)
        for path in Path(workspace.folder).glob("img_emb/img_emb_00001.npy"):
            features = np.load(path)
            features[3, 2] = np.nan
            np.save(path, features)
        return records

    with pytest.raises(StageFailed, match=r"no scores: features of sample 9 hold NaN or infinity \(1 such"):
        evaluated(untrained_run[0], tmp_path, poisoned, monkeypatch)


def test_more_images_per_prompt_keep_the_first_of_each(untrained_run, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(untrained_run[0], root)
    images = []
    for each, count in ((1, 13), (2, 26)):
        plan = untrained.plan_of(root, evaluate__num_images=count, evaluate__images_per_prompt=each)
        snapshot = untrained.make(plan, next(s for s in plan.pending if s.name == "generate"))
        blocks = sorted(Path(snapshot.folder).glob("generated/*.npy"))
        images.append(np.concatenate([np.load(path) for path in blocks]))
    one, two = images
    assert len(two) == 26 and not np.array_equal(two[0], two[1])
    assert np.abs(two[::2].astype(int) - one).max() <= 1, "blocks differ, and a sum rounds by its batch"


def test_inception_weights_bring_its_metrics_and_the_reconstructions_own(
    untrained_run, tmp_path, monkeypatch, inception_weights
):
    asked = {
        "evaluate__inception": inception_weights,
        "evaluate__inception_is_custom": True,
        "evaluate__metrics": "fid_clean,caption_recall_1",
        "evaluate__reference_images": 12,
        "evaluate__reconstruction_images": 8,
    }
    plan = untrained.plan_of(untrained_run[0], **asked)
    spec = next(runs.spec_of(plan, stage) for stage in plan.stages if stage.name == "evaluate")
    monkeypatch.setattr(evaluate, "map_shards", untrained.inline)
    monkeypatch.setattr(evaluate, "BLOCK", 50)
    config = evaluate.EvaluateConfig.model_validate(spec.config)
    workspace = Workspace(str(tmp_path / "out"), spec.fingerprint)
    evaluate.run(config, {role: ref.open() for role, ref in spec.inputs.items()}, workspace)
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/scores.json").read_text())["scores"]}
    of_inception = [
        "fid",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
        "fid_clean",
    ]
    assert {*of_inception, "vae_rfid", "caption_recall_1"} < set(rows)
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    for name in (*of_inception, "vae_rfid"):
        protocol = Protocol.model_validate(rows[name]["protocol"])
        assert (protocol.extractor_digest, protocol.resize) == (
            digest, "clean" if name == "fid_clean" else "tf1"
        )  # fmt: skip
    assert rows["fid"]["protocol"]["reference_n"] == 12 and rows["vae_rfid"]["n"] == 8
    assert rows["inception_score"]["protocol"]["reference"] == ""
    features = [np.load(path) for path in sorted((tmp_path / "out/inception").glob("*.npy"))]
    fake, real = np.concatenate(features[:-1]), features[-1]
    assert (len(fake), len(real)) == (26, 12)
    assert rows["fid"]["value"] == pytest.approx(
        frechet_distance(Gaussian.fitted(real), Gaussian.fitted(fake)).value
    )
    assert rows["coverage"]["value"] == neighbours(real, fake).coverage.value


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"metrics": "fod"}, "there is no metric fod; there are fid, "),
        ({"metrics": "fid_clean"}, "metric fid_clean needs evaluate.inception: the file pt_inception"),
        ({"metrics": ["fd_dinov2"]}, "needs evaluate.dinov2: a folder with the files of"),
        ({"metrics": "kid", "inception": "w", "reference": "r.npz"}, "a mean and a covariance alone"),
        ({"metrics": "fid_clean", "inception": "w", "reference": "r.npz"}, "leave one of the two out"),
    ],
)
def test_a_metric_that_cannot_be_had_is_refused_at_once(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        evaluate.EvaluateConfig.model_validate(settings)


def test_statistics_alone_leave_out_what_needs_pictures():
    chosen = evaluate.EvaluateConfig(inception="w", reference="r.npz").chosen
    assert {"fid", "inception_score", "fd_clip"} <= set(chosen) and not {"kid", "recall"} & set(chosen)


def test_features_of_the_real_pictures_are_taken_from_an_evaluation_that_has_them(
    untrained_run, tmp_path, monkeypatch, inception_weights
):
    asked = {
        "evaluate__inception": inception_weights,
        "evaluate__inception_is_custom": True,
        "evaluate__reference_images": 12,
        "evaluate__reconstruction_images": 8,
    }
    plan = untrained.plan_of(untrained_run[0], **asked)
    spec = next(runs.spec_of(plan, stage) for stage in plan.stages if stage.name == "evaluate")
    config = evaluate.EvaluateConfig.model_validate(spec.config)
    inputs = {role: ref.open() for role, ref in spec.inputs.items()}
    looked: list[list[str]] = []

    def one_by_one(work, arguments, tasks, workspace):
        done = finished(tasks, workspace.folder)
        todo = [task for task in tasks if task.index not in done]
        looked.append([task.payload["kind"] for task in todo])
        made = dict(
            zip([t.index for t in todo], untrained.inline(work, arguments, todo, workspace), strict=True)
        )
        return tuple((done | made)[task.index] for task in tasks)

    monkeypatch.setattr(evaluate, "map_shards", one_by_one)
    for name in ("first", "second"):
        evaluate.run(config, inputs, Workspace(str(tmp_path / name), spec.fingerprint))
    assert looked[0].count("reference") == 2 and looked[1] == [k for k in looked[0] if k != "reference"]
    first, second = ((tmp_path / name / "scores.json").read_bytes() for name in ("first", "second"))
    assert first == second
    other = config.model_copy(update={"reference_images": 11})
    evaluate.run(other, inputs, Workspace(str(tmp_path / "third"), spec.fingerprint))
    assert looked[2].count("reference") == 2, "other pictures, other features"
