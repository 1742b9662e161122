"""Recipes: frozen paths, typed `--set`, and production networks that have the promised size."""

from __future__ import annotations

import json

import pytest
import torch

from data.errors import UnknownPath, UserError
from data.sources import SourceConfig
from flows.assignments import edited, paths
from flows.recipes import RECIPES, Recipe, find, prepare, with_data
from stages.contract import FanoutConfig
from training.systems.denoiser import Denoiser
from training.systems.prior import Prior

TRAINED = ("clip", "vae", "prior", "denoiser")
FROZEN = {
    "source.kind": ("digits", "digits"),
    "source.limit": ("7", 7),
    "shard.samples_per_shard": ("100", 100),
    "shard.image_size": ("64", 64),
    "shard.max_failed_fraction": ("0.5", 0.5),
    "fanout.num_workers": ("2", 2),
    "fanout.embed.num_gpus": ("0.5", 0.5),
    **{f"{part}.max_steps": ("5", 5) for part in TRAINED},
    **{f"{part}.batch_size": ("8", 8) for part in TRAINED},
    **{f"{part}.learning_rate": ("1e-3", 1e-3) for part in TRAINED},
    **{f"{part}.checkpoint_every": ("3", 3) for part in TRAINED},
    **{f"{part}.num_workers": ("2", 2) for part in TRAINED},
    **{f"{part}.seed": ("11", 11) for part in TRAINED},
    "clip.pretrained": ("ViT-L-14/openai", "ViT-L-14/openai"),
    "vae.pretrained": ("some/vae", "some/vae"),
    "evaluate.num_images": ("16", 16),
    "evaluate.guidance_scale": ("3", 3.0),
    "evaluate.inception": ("weights.safetensors", "weights.safetensors"),
    "seed": ("4", 4),
}
"""Path -> (text, value): what documents, scripts and users rely on."""

PLAIN = Recipe(name="plain", source=SourceConfig(kind="shapes"))


def at(recipe: Recipe, path: str):
    value = recipe
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", FROZEN)
def test_every_path_that_users_rely_on_can_be_set(path):
    text, value = FROZEN[path]
    assert at(edited(find("demo"), [f"{path}={text}"]), path) == value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_says_what_it_is_and_survives_json(name):
    recipe = find(name)
    assert recipe.name == name and recipe.summary
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def test_recipes_are_frozen_and_an_edit_returns_another():
    recipe = find("demo")
    assert edited(recipe, ["seed=3"]).seed == 3 and recipe.seed == 0
    assert edited(recipe, []) is recipe


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("denoiser.learning_rate=1e-4", 1e-4),
        ("denoiser.max_steps = 20", 20),
        ("denoiser.zero_terminal_snr=true", True),
        ("denoiser.min_snr_gamma=5", 5.0),
        ("denoiser.min_snr_gamma=null", None),
        ("source.limit=none", None),
        ("denoiser.block_out_channels=[32,64]", (32, 64)),
        ("denoiser.block_out_channels=32,64", (32, 64)),
        ("denoiser.block_out_channels=(32, 64)", (32, 64)),
        ("denoiser.attention_levels=true,false", (True, False)),
        ("denoiser.num_attention_heads=2", 2),
        ("denoiser.num_attention_heads=2,4", (2, 4)),
        ("clip.pretrained=123", "123"),
        ("source.path=/a=b", "/a=b"),
    ],
)
def test_values_are_typed_by_the_field_that_they_are_for(assignment, value):
    found = at(edited(PLAIN, [assignment]), assignment.partition("=")[0].strip())
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("denoiser.max_steps=0", "--set denoiser.max_steps=0: input should be greater than or equal to 1"),
        ("denoiser.max_steps=many", "--set denoiser.max_steps=many: input should be a valid integer"),
        ("denoiser.max_steps=2.5", "input should be a valid integer"),
        ("denoiser.learning_rate=7", "less than or equal to 1 (peak learning rate of AdamW)"),
        ("denoiser.learning_rate=NaN", "input should be a finite number"),
        ("denoiser.block_out_channels=64", "input should be a valid tuple, such as 64,128"),
        ("denoiser.precision=fp8", "(fp32|bf16)"),
        ("source.kind=cats", "'auto', 'folder', 'table', 'webdataset', 'shapes' or 'digits'"),
        ("shard.max_failed_fraction=-0.1", "greater than or equal to 0"),
        ("denoiser.max_steps=null", "input should be a valid integer"),
        ("denoiser.max_steps=", "has no value"),
        ("denoiser.max_steps", "has no '='"),
        ("denoiser.image_drop=0.9", "caption_drop 0.5 is below image_drop 0.9"),
    ],
)
def test_a_bad_value_says_what_was_given_and_what_is_allowed(assignment, sentence):
    with pytest.raises(UserError) as refused:
        edited(PLAIN, [assignment])
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert assignment.partition("=")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("denoiser.max_step", "denoiser.max_steps"),
        ("denoiser.lr", "denoiser."),
        ("sead", "seed"),
        ("evaluate", "evaluate."),
        ("name", "its sections are"),
        ("xyz", "its sections are clip, denoiser"),
    ],
)
def test_an_unknown_path_names_the_nearest(path, near):
    with pytest.raises(UnknownPath, match="no such path") as refused:
        edited(find("demo"), [f"{path}=1"])
    assert near in str(refused.value)


@pytest.mark.parametrize("order", [1, -1])
def test_settings_that_need_each_other_come_in_any_order(order):
    pair = ["clip.image_size=30", "clip.vision_patch_size=5"]
    assert edited(PLAIN, pair[::order]).clip.image_size == 30
    with pytest.raises(
        UserError, match=r"clip\.image_size=30: image_size 30 is not a multiple of vision_patch_size 4"
    ):
        edited(PLAIN, pair[:1])


def test_the_later_of_two_settings_of_one_path_counts():
    assert edited(find("demo"), ["seed=1", "seed=2"]).seed == 2


def test_every_settable_path_has_a_meaning():
    assert [path for path, field in paths().items() if not field.description] == []


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="no recipe 'unclp'; did you mean unclip"):
        find("unclp")


def test_a_source_of_ones_own_replaces_the_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = with_data(find("demo"), "pictures").source
    assert (source.kind, source.path) == ("auto", str(tmp_path / "pictures"))
    assert with_data(prepare(), "file:///somewhere").source.path == "file:///somewhere"
    with pytest.raises(UserError, match="source is empty"):
        with_data(find("demo"), "")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_production_prior_has_a_billion_parameters():
    width, tokens = 768, 77  # of ViT-L/14
    zeros = torch.zeros(width)
    prior = Prior(
        find("unclip").prior,
        width,
        tokens,
        zeros,
        zeros,
        zeros[None],
        torch.zeros(1, tokens, width),
        torch.tensor([2]),
    )
    with torch.device("meta"):
        model = prior.build()
    assert all(p.is_meta for p in model.parameters())
    assert 0.9e9 < parameters(model) < 1.2e9


def test_the_production_denoiser_is_of_stable_unclips_class():
    width, tokens = 768, 77
    zeros = torch.zeros(width)
    config = find("unclip").denoiser
    denoiser = Denoiser(
        config, (4, 32, 32), 0.18215, width, width, zeros, zeros, torch.zeros(1, tokens, width)
    )
    with torch.device("meta"):
        model = denoiser.build()
    assert all(p.is_meta for p in model.parameters())
    assert 0.8e9 < parameters(model) < 1.0e9
    assert config.precision == "bf16" and config.fsdp


def test_a_stage_has_its_own_share_before_that_of_all():
    recipe = edited(
        PLAIN,
        [
            "fanout.num_workers=4",
            "fanout.num_gpus=1",
            "fanout.embed.num_gpus=0.5",
            "fanout.shard.num_workers=2",
        ],
    )
    given = {stage: recipe.fanout.of(stage) for stage in ("shard", "embed", "encode", "prior")}
    assert {stage: (f.num_workers, f.num_gpus) for stage, f in given.items()} == {
        "shard": (2, 1), "embed": (4, 0.5), "encode": (4, 1), "prior": (4, 1),
    }  # fmt: skip
    assert all(type(each) is FanoutConfig for each in given.values()), "a spec tells one stage's share alone"
    for path in ("fanout.prior.num_workers", "fanout.shard.num_gpus"):
        with pytest.raises(UnknownPath, match=path):
            edited(PLAIN, [f"{path}=1"])
