"""The built-in shapes: what is drawn, said, held out and recognised."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from data import shape_judge, shapes


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy(spoil, every: int = 1) -> float:
    """Share of all scenes, or of one in `every`, jittered and then spoilt, of which every attribute is recognised."""
    rng, scenes = np.random.default_rng(0), shapes.SCENES[::every]
    return float(np.mean([shape_judge.recognise(spoil(shapes.render(s, rng), rng)) == s for s in scenes]))


def blurred(image: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    return np.round(ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0))).astype(np.uint8)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.round(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


def compressed(image: np.ndarray, _rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("built_in") / "shapes"
    shapes.write_folder(target, count=1200, seed=3)
    return target


def test_there_are_1280_different_scenes():
    assert len(set(shapes.SCENES)) == len(shapes.SCENES) == 1280


def test_every_colour_shape_and_position_stays_frequent_among_the_seen_scenes():
    seen = [s for s in shapes.SCENES if not shapes.is_heldout(s)]
    assert len(seen) == 1280 - 120
    assert min(Counter(s.colour for s in seen).values()) >= 120
    assert min(Counter(s.shape for s in seen).values()) >= 240
    assert set(Counter(s.position for s in seen).values()) == {len(seen) // 5}


def test_a_picture_is_32_px_rgb_and_a_function_of_its_generator():
    first, again, other = (shapes.render(shapes.SCENES[7], np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", shapes.SIZES)
@pytest.mark.parametrize("position", shapes.POSITIONS)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_shape_lies_whole_inside_the_picture_with_its_centroid_where_its_position_says(
    shape, position, size
):
    image = shapes.render(shapes.Scene("yellow", shape, size, "black", position))
    ink = image[..., 0] / 255.0
    across, down = shapes.POSITIONS[position]
    along = np.arange(32) + 0.5 - 16
    assert ink.sum(0) @ along / ink.sum() == pytest.approx(across, abs=0.25)
    assert ink.sum(1) @ along / ink.sum() == pytest.approx(down, abs=0.25)
    assert image[0].max() == image[-1].max() == image[:, 0].max() == image[:, -1].max() == 0


@pytest.mark.parametrize(
    ("spoil", "every", "least"),
    [(lambda image, _: image, 1, 0.999), (blurred, 3, 0.99), (noisy, 3, 0.99), (compressed, 3, 0.96)],
    ids=["clean", "blurred", "noisy", "compressed"],
)
def test_the_judge_is_right_about_all_scenes(spoil, every, least):
    assert accuracy(spoil, every) >= least


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_matches_nothing_but_its_background(level):
    seen = shape_judge.recognise(np.full((32, 32, 3), level, np.uint8))
    assert (seen.colour, seen.shape, seen.size, seen.position) == ("none",) * 4
    assert shapes.BACKGROUNDS[seen.background] == (level,) * 3


def test_pure_noise_is_judged_without_an_error():
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape_judge.recognise(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        shape_judge.recognise(np.zeros((64, 64, 3), np.uint8))


def test_matches_names_the_one_attribute_that_is_wrong():
    image = shapes.render(shapes.Scene("red", "star", "large", "white", "left"))
    truth = {
        "kind": "shapes",
        "colour": "blue",
        "shape": "star",
        "size": "large",
        "background": "white",
        "position": "left",
    }
    expected = {"colour": False, "shape": True, "size": True, "background": True, "position": True}
    assert shape_judge.matches(image, truth) == expected


def test_every_phrasing_states_all_five_attributes_and_tells_all_scenes_apart():
    for scene in shapes.SCENES:
        for text in shapes.phrasings(scene):
            words = set(text.replace(",", "").split())
            assert {scene.colour, scene.shape, scene.size, scene.background, scene.position} <= words
    texts = [text for scene in shapes.SCENES for text in shapes.phrasings(scene)]
    assert len(set(texts)) == len(texts)


def test_a_caption_is_a_function_of_its_generator_and_phrasings_vary():
    drawn = [shapes.caption(shapes.SCENES[0], np.random.default_rng(seed)) for seed in range(20)]
    assert drawn == [shapes.caption(shapes.SCENES[0], np.random.default_rng(seed)) for seed in range(20)]
    assert len(set(drawn)) > 3


def test_the_folder_holds_every_seen_scene_and_no_held_out_one(folder):
    rows = read_lines(folder / "metadata.jsonl")
    scene_of = {text: scene for scene in shapes.SCENES for text in shapes.phrasings(scene)}
    shown = [scene_of[row["text"]] for row in rows]
    assert [row["file_name"] for row in rows] == [f"images/{i:06d}.png" for i in range(1200)]
    assert set(shown) == {s for s in shapes.SCENES if not shapes.is_heldout(s)}
    for row, scene in zip(rows[:100], shown, strict=False):
        with Image.open(folder / row["file_name"]) as image:
            assert shape_judge.recognise(np.asarray(image)) == scene


def test_prompts_ask_for_held_out_scenes_one_time_in_four_at_every_length(folder):
    prompts = read_lines(folder / "prompts.jsonl")
    heldout = np.cumsum([prompt["heldout"] for prompt in prompts]) / np.arange(1, len(prompts) + 1)
    assert len({prompt["text"] for prompt in prompts}) == len(prompts)
    assert np.abs(heldout[99:] - 0.25).max() < 0.01
    assert {shapes.is_heldout(_scene(p["truth"])) == p["heldout"] for p in prompts} == {True}
    assert {_scene(p["truth"]) for p in prompts} == set(shapes.SCENES)


def _scene(truth: dict[str, str]) -> shapes.Scene:
    assert truth["kind"] == "shapes"
    return shapes.Scene(**{name: value for name, value in truth.items() if name != "kind"})


def test_equal_seeds_give_equal_bytes_and_a_longer_folder_begins_like_a_shorter_one(tmp_path):
    for name, count, seed in (("a", 5, 1), ("b", 9, 1), ("c", 5, 2)):
        shapes.write_folder(tmp_path / name, count=count, seed=seed)
    a, b, c = ((tmp_path / name / "metadata.jsonl").read_text() for name in "abc")
    assert b.startswith(a)
    assert a != c
    for i in range(5):
        image = f"images/{i:06d}.png"
        assert (tmp_path / "a" / image).read_bytes() == (tmp_path / "b" / image).read_bytes()


def test_writing_again_changes_nothing_and_leaves_no_draft(tmp_path):
    shapes.write_folder(tmp_path / "shapes", count=3, seed=0)
    before = (tmp_path / "shapes" / "metadata.jsonl").stat()
    shapes.write_folder(tmp_path / "shapes", count=99, seed=1)
    assert (tmp_path / "shapes" / "metadata.jsonl").stat() == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_a_failure_halfway_leaves_no_folder(tmp_path):
    def pictures():
        yield shapes.render(shapes.SCENES[0]), "a caption"
        raise InterruptedError

    with pytest.raises(InterruptedError):
        shapes.publish_folder(tmp_path / "shapes", pictures(), [])
    assert list(tmp_path.iterdir()) == []


def test_a_count_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="count is 0"):
        shapes.write_folder(tmp_path / "shapes", count=0, seed=0)
