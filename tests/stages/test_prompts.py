"""Prompt manifests, and the noise that belongs to each image of a prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError

from data.errors import UserError
from data.sources import Prompt
from stages.generate import GenerateConfig, noise_index
from stages.prompts import listed_prompts
from training.randomness import Draws


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a star\n\n  a circle  \n"),
        ("p.jsonl", '{"text": "a star"}\n{"caption": "a circle", "id": 7}\n'),
        ("p.tsv", "id\timage_id\tcaption\n1\t2\ta star\n3\t4\ta circle\n"),
        ("p.csv", 'id,caption\n1,a star\n2,"a circle"\n'),
    ],
)
def test_a_manifest_is_read_as_people_have_them(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert listed_prompts(str(tmp_path / name)) == [Prompt(text="a star"), Prompt(text="a circle")]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("p.csv", "id,text_of\n1,a star\n", "a column caption"),
        ("p.jsonl", "a star\n", "holds no prompts"),
        ("p.jsonl", "[1]\n", "holds no prompts"),
        ("p.csv", "caption\n" + "x" * 200_000, "holds no prompts"),
        ("p.jsonl", "[" * 100_000, "holds no prompts"),
        ("p.tsv", "caption\tx\n \t1\n", "prompt 1 is empty"),
    ],
)
def test_what_is_no_manifest_says_what_one_is(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=sentence):
        listed_prompts(str(tmp_path / name))


def test_no_two_images_share_noise_and_more_images_per_prompt_change_none():
    one = [noise_index(image, 1) for image in range(6)]
    three = [noise_index(image, 3) for image in range(18)]
    assert len(set(three)) == 18 and three[::3] == one == list(range(6))
    noise = Draws(0, torch.tensor(three)).normal("x_T", (16,))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


def test_every_prompt_gets_the_same_number_of_images():
    assert GenerateConfig(num_images=12, images_per_prompt=3).num_prompts == 4
    with pytest.raises(ValidationError, match="num_images=10 is no multiple of images_per_prompt=3"):
        GenerateConfig(num_images=10, images_per_prompt=3)
