"""The built-in digits: what is written, and how good their judge is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import digits


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_judge_names_the_digits_it_never_saw():
    assert digits.judge_accuracy() > 0.94


def test_a_picture_is_32_px_dark_ink_on_white():
    grid = np.zeros((8, 8))
    grid[3:5, 3:5] = 16
    image = digits.render(grid)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert image[16, 16].tolist() == [0, 0, 0]
    assert image[0, 0].tolist() == [255, 255, 255]


def test_every_phrasing_names_its_digit():
    for digit, name in enumerate(digits.NAMES):
        assert all(name in text.replace(",", "").split() for text in digits.phrasings(digit))


def test_the_folder_holds_the_training_digits_and_no_more(tmp_path):
    digits.write_folder(tmp_path / "digits", count=10_000, seed=0)
    rows = read_lines(tmp_path / "digits" / "metadata.jsonl")
    assert [row["file_name"] for row in rows] == [
        f"images/{i:06d}.png" for i in range(digits.TRAINING_DIGITS)
    ]
    assert len(list((tmp_path / "digits" / "images").iterdir())) == digits.TRAINING_DIGITS


def test_captions_say_what_the_pictures_show(tmp_path):
    digits.write_folder(tmp_path / "digits", count=100, seed=1)
    right = []
    for row in read_lines(tmp_path / "digits" / "metadata.jsonl"):
        with Image.open(tmp_path / "digits" / row["file_name"]) as image:
            right.append(digits.NAMES[digits.recognise(np.asarray(image))] in row["text"])
    assert np.mean(right) > 0.98


def test_prompts_ask_for_each_digit_equally_often_with_its_truth(tmp_path):
    digits.write_folder(tmp_path / "digits", count=1, seed=0)
    prompts = read_lines(tmp_path / "digits" / "prompts.jsonl")
    assert len({prompt["text"] for prompt in prompts}) == len(prompts)
    assert Counter(p["truth"]["digit"] for p in prompts[:20]) == dict.fromkeys(range(10), 2)
    assert all(digits.NAMES[p["truth"]["digit"]] in p["text"] for p in prompts)
    assert {(p["truth"]["kind"], p["heldout"]) for p in prompts} == {("digits", False)}


def test_equal_seeds_write_equal_folders_and_writing_again_changes_nothing(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("a", 2)):
        digits.write_folder(tmp_path / name, count=20, seed=seed)
    a, b, c = ((tmp_path / name / "metadata.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_matches_compares_with_the_truth():
    zero = digits.render(np.asarray(digits._bundled()[0][0]))
    assert digits.matches(zero, {"kind": "digits", "digit": 0}) == {"digit": True}
    assert digits.matches(zero, {"kind": "digits", "digit": 7}) == {"digit": False}


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="count is 0"):
        digits.write_folder(tmp_path / "digits", count=0, seed=0)
