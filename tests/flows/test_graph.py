"""A recipe as a graph: which stages, in which order, and what a missing column does."""

from __future__ import annotations

import socket

import pytest

from data.errors import UserError
from flows.assignments import edited
from flows.graph import check_columns, prepare_nodes, unclip_nodes
from flows.recipes import demo, prepare, unclip, with_data
from stages.contract import InputRef

STAGES = ["shard", "clip", "embed", "vae", "encode", "prior", "denoiser", "generate", "evaluate", "report"]


def names(*assignments: str) -> list[str]:
    return [node.name for node in unclip_nodes(edited(demo(), assignments))]


@pytest.fixture
def clip_folder(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text("{}")
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    return folder


def test_the_main_recipe_has_its_stages_by_name_and_in_order():
    assert names() == STAGES


def test_a_pretrained_encoder_takes_its_training_stages_place():
    assert names("clip.pretrained=ViT-L-14/openai") == [s for s in STAGES if s != "clip"]
    assert names("vae.pretrained=some/vae") == [s for s in STAGES if s != "vae"]
    assert names("clip.pretrained=ViT-L-14/openai", "vae.pretrained=some/vae") == [
        s for s in STAGES if s not in ("clip", "vae")
    ]


def test_a_pretrained_folder_is_an_input_from_elsewhere_known_by_its_content(clip_folder, monkeypatch):
    def embed(source: str) -> InputRef:
        nodes = unclip_nodes(edited(demo(), [f"clip.pretrained={source}"]))
        return next(node for node in nodes if node.name == "embed").inputs["clip"]

    monkeypatch.chdir(clip_folder.parent)
    ref = embed("clip")
    assert ref == embed(str(clip_folder)) == embed("./clip") == embed(f"file://{clip_folder}")
    assert ref.external and ref.folder == str(clip_folder), "workers may stand in another folder"
    (clip_folder / "open_clip_model.safetensors").write_bytes(b"other weights")
    assert embed("clip").fingerprint != ref.fingerprint


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/nowhere-at-all", "file:///no/where"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(source):
    with pytest.raises(UserError, match="does not exist"):
        names(f"vae.pretrained={source}")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("shard.image_size=33", "needs squares whose side is a multiple of"),
        ("shard.resize=keep_ratio", "needs squares"),
        ("clip.text_width=128", "the prior needs them equal"),
        ("evaluate.inception=/no/where", "evaluate.inception=/no/where: nothing lies at /no/where"),
        ("evaluate.dinov2=/no/where", "or hub to download it, or null for none of its metrics"),
        ("evaluate.clip=hub", "evaluate.clip=hub: 'hub' names nothing: write hub:OWNER/NAME"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_at_once(assignment, sentence):
    with pytest.raises(UserError, match=sentence):
        names(assignment)
    if assignment.startswith("shard"):
        names(assignment, "vae.pretrained=some/vae")


def test_an_incomplete_folder_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(UserError, match=r"has no open_clip_config\.json"):
        names(f"clip.pretrained={tmp_path}")


def test_the_seed_of_a_recipe_moves_every_trained_stage_and_generation():
    plain, moved = (unclip_nodes(edited(demo(), [f"seed={seed}"])) for seed in (0, 5))
    changed = [a.name for a, b in zip(plain, moved, strict=True) if a.config != b.config]
    assert changed == ["clip", "vae", "prior", "denoiser", "generate"]


def test_a_column_that_no_earlier_stage_writes_is_refused():
    nodes = unclip_nodes(demo())
    check_columns(nodes)
    with pytest.raises(
        UserError, match="stage prior reads img_emb, text_emb, text_hidden, which no earlier stage writes"
    ):
        check_columns([node for node in nodes if node.name != "embed"])


def test_preparing_makes_a_column_for_each_encoder_given(clip_folder, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")

    def prepared(*assignments: str) -> list[str]:
        recipe = with_data(edited(prepare(), assignments), str(tmp_path))
        return [node.name for node in prepare_nodes(recipe)]

    assert prepared() == ["shard"]
    assert prepared(f"clip.pretrained={clip_folder}") == ["shard", "embed"]
    assert prepared("vae.pretrained=some/vae") == ["shard", "encode"]
    assert prepared("vae.pretrained=some/vae", "t5.pretrained=some/t5") == ["shard", "text", "encode"]


def test_latents_of_pictures_in_buckets_are_refused_before_anything_is_made(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"")
    bucketed = ["vae.pretrained=some/vae", "shard.resize=bucket"]
    with pytest.raises(UserError, match="resize=bucket: the latents of a shard need pictures of one size"):
        prepare_nodes(with_data(edited(prepare(), bucketed), str(tmp_path)))
    with pytest.raises(UserError, match="resize=bucket"):
        unclip_nodes(edited(demo(), bucketed))


def test_a_t5_that_no_part_of_a_recipe_reads_is_refused():
    with pytest.raises(
        UserError, match=r"t5.pretrained=some/t5: no part of demo reads T5's states; .*darkroom prepare"
    ):
        unclip_nodes(edited(demo(), ["t5.pretrained=some/t5"]))


def test_planning_with_hub_names_asks_no_network(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("planning opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "picture.png").write_bytes(b"")
    nodes = unclip_nodes(with_data(unclip(), str(tmp_path)))
    assert [node.name for node in nodes] == [s for s in STAGES if s not in ("clip", "vae")]
