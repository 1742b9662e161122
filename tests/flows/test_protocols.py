"""Built-in protocols: a golden JSON each, selectable by name, and a sentence for what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.errors import UserError
from flows.assignments import edited
from flows.graph import unclip_nodes
from flows.protocols import PROTOCOLS
from flows.recipes import EvaluationConfig, demo

GOLDEN = Path(__file__).parent / "protocols"


def test_every_protocol_has_a_golden_file():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_is_what_its_golden_file_says(name):
    assert PROTOCOLS[name].model_dump(mode="json") == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_fixes_fields_that_there_are_and_is_chosen_by_name(name):
    assert {*PROTOCOLS[name].fixes, *PROTOCOLS[name].needs} <= set(EvaluationConfig.model_fields)
    chosen = edited(demo(), [f"evaluate.protocol={name}"]).evaluate
    assert {field: getattr(chosen, field) for field in PROTOCOLS[name].fixes} == PROTOCOLS[name].fixes


def test_the_demo_is_evaluated_as_its_protocol_says():
    assert edited(demo(), ["evaluate.protocol=demo"]).evaluate == demo().evaluate.model_copy(
        update={"protocol": "demo"}
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_setting_against_its_protocol_is_refused_in_either_order(order):
    settings = ["evaluate.protocol=pick5k", "evaluate.num_images=50"][::order]
    with pytest.raises(
        UserError, match=r"evaluate.protocol=pick5k fixes evaluate.num_images at 5000, not 50"
    ):
        edited(demo(), settings)
    assert (
        edited(demo(), ["evaluate.protocol=pick5k", "evaluate.guidance_scale=4"]).evaluate.num_images == 5000
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["evaluate.protocol=nothing"], "there are demo, pick5k, coco30k"),
        (["evaluate.protocol=coco30k"], "is defined at 256 px: set shard.image_size=256, not 32"),
        (
            ["evaluate.protocol=coco30k", "shard.image_size=256"],
            "needs evaluate.prompts: 30,000 captions drawn at random",
        ),
        (["evaluate.protocol=coco30k_mlperf", "shard.image_size=512"], "val2014_30k.tsv"),
        (["evaluate.reference=here.npz"], "give evaluate.inception too"),
    ],
)
def test_what_is_not_there_is_named_before_anything_starts(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        unclip_nodes(edited(demo(), settings))


def test_a_manifest_is_named_by_its_digest_and_must_have_enough_prompts(tmp_path):
    manifest = tmp_path / "prompts.txt"
    manifest.write_text("a red star\na blue circle\n")
    asked = [f"evaluate.prompts={manifest}", "evaluate.num_images=6"]
    with pytest.raises(
        UserError, match=r"has 2 prompts, and evaluate.num_images=6 with 1 per prompt needs 6"
    ):
        unclip_nodes(edited(demo(), asked))
    (generate,) = (
        n
        for n in unclip_nodes(edited(demo(), [*asked, "evaluate.images_per_prompt=3"]))
        if n.name == "generate"
    )
    digest = generate.config.prompts_digest
    assert len(digest) == 64
    with pytest.raises(UserError, match="it is another list"):
        unclip_nodes(
            edited(demo(), [*asked, "evaluate.images_per_prompt=3", f"evaluate.prompts_digest={'0' * 64}"])
        )
    with pytest.raises(UserError, match="cannot be read"):
        unclip_nodes(edited(demo(), [f"evaluate.prompts={tmp_path}/none.txt"]))


def test_reference_statistics_of_another_extractor_are_refused(tmp_path):
    weights, reference = tmp_path / "w.pth", tmp_path / "r.npz"
    weights.touch()
    asked = [f"evaluate.inception={weights}", f"evaluate.reference={reference}"]
    with pytest.raises(UserError, match="does not exist"):
        unclip_nodes(edited(demo(), asked))
    np.savez(reference, mu=np.zeros(512), sigma=np.eye(512))
    with pytest.raises(UserError, match="width 512, and Inception's are 2048"):
        unclip_nodes(edited(demo(), asked))
    np.savez(reference, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="holds pictures"):
        unclip_nodes(edited(demo(), asked))
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    assert unclip_nodes(edited(demo(), asked))
    told = {"extractor": "inception", "resize": "tf1", "digest": storage.sha256(str(weights))[1]}
    beside = reference.with_suffix(".json")
    beside.write_text(json.dumps(told))
    assert unclip_nodes(edited(demo(), asked))
    for name, theirs in (("extractor", "inception_clean"), ("resize", "clean"), ("digest", "0" * 64)):
        beside.write_text(json.dumps(told | {name: theirs}))
        with pytest.raises(UserError, match=f"holds statistics of {name} {theirs[:60]}"):
            unclip_nodes(edited(demo(), asked))


@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        ('["fd_clip <= 12", "prompt_accuracy > 0.9"]', "cannot be read"),
        ("fd_klip <= 12", "did you mean fd_clip"),
        ("[1", "evaluate.gates"),
    ],
)
def test_a_malformed_gate_is_refused_with_the_settings(gates, sentence):
    with pytest.raises(UserError, match=sentence):
        edited(demo(), [f"evaluate.gates={gates}"])


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ("fid <= 3", "fid is measured with evaluate.inception alone: the file pt_inception"),
        ("vae_rfid <= 3", "vae_rfid is measured with evaluate.inception alone"),
        ("fd_dinov2 <= 3", "fd_dinov2 is measured with evaluate.dinov2 alone"),
        ("caption_recall_1 >= 0.5", "measured where evaluate.metrics=caption_recall_1 asks for it"),
    ],
)
def test_a_gate_on_what_is_not_measured_is_refused_before_a_run_and_not_by_its_report(gate, sentence):
    with pytest.raises(UserError, match=sentence):
        edited(demo(), [f"evaluate.gates={gate}"])
    given = ("inception=weights.pth", "dinov2=folder", "metrics=caption_recall_1")
    edited(demo(), [f"evaluate.gates={gate}", *(f"evaluate.{setting}" for setting in given)])


def test_gates_are_a_list_or_a_line():
    wanted = ("fd_clip <= 12", "not worse than demo-1")
    for text in ('["fd_clip <= 12", "not worse than demo-1"]', "fd_clip <= 12, not worse than demo-1"):
        assert edited(demo(), [f"evaluate.gates={text}"]).evaluate.gates == wanted
