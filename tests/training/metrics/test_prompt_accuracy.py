from dataclasses import asdict, replace

import numpy as np
import pytest

from data import digits, shapes
from training.metrics.prompt_accuracy import prompt_accuracy

SCENE = shapes.Scene(colour="red", shape="circle", size="large", background="white", position="left")


def truth_of(scene: shapes.Scene) -> dict:
    return {"kind": "shapes", **asdict(scene)}


def test_clean_renders_of_the_truth_are_all_right():
    scenes = shapes.SCENES[::97]
    accuracy = prompt_accuracy(np.stack([shapes.render(s) for s in scenes]), [truth_of(s) for s in scenes])
    assert accuracy.correct.all() and accuracy.correct.shape == (len(scenes),)
    assert set(accuracy.by_attribute) == {"colour", "shape", "size", "background", "position"}
    assert all(right.tolist() == [1.0] * len(scenes) for right in accuracy.by_attribute.values())


def test_one_wrong_attribute_costs_the_picture_and_that_attribute_alone():
    scenes = [
        SCENE,
        replace(SCENE, colour="blue"),
        replace(SCENE, position="top"),
        replace(SCENE, size="small"),
    ]
    accuracy = prompt_accuracy(np.stack([shapes.render(s) for s in scenes]), [truth_of(SCENE)] * 4)
    assert {attribute: right.tolist() for attribute, right in accuracy.by_attribute.items()} == {
        "colour": [1, 0, 1, 1],
        "shape": [1, 1, 1, 1],
        "size": [1, 1, 1, 0],
        "background": [1, 1, 1, 1],
        "position": [1, 1, 0, 1],
    }
    assert accuracy.correct.tolist() == [True, False, False, False]


def test_kinds_may_be_mixed_and_an_attribute_counts_where_the_truth_has_it():
    blank = np.full((32, 32, 3), 255, np.uint8)
    seen = digits.recognise(blank)
    images = np.stack([shapes.render(SCENE), blank, blank])
    truths = [
        truth_of(SCENE),
        {"kind": "digits", "digit": seen},
        {"kind": "digits", "digit": (seen + 1) % 10},
    ]
    accuracy = prompt_accuracy(images, truths)
    assert accuracy.correct.tolist() == [True, True, False]
    np.testing.assert_array_equal(accuracy.by_attribute["colour"], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(accuracy.by_attribute["digit"], [np.nan, 1.0, 0.0])


def test_what_cannot_be_judged_is_refused():
    images = shapes.render(SCENE)[None]
    with pytest.raises(ValueError, match="non-empty uint8 array"):
        prompt_accuracy(images[:0], [])
    with pytest.raises(ValueError, match="non-empty uint8 array"):
        prompt_accuracy(images / 255.0, [truth_of(SCENE)])
    with pytest.raises(ValueError, match="1 images for 2 truths"):
        prompt_accuracy(images, [truth_of(SCENE)] * 2)
    with pytest.raises(ValueError, match="kind 'birds': allowed are digits, shapes"):
        prompt_accuracy(images, [{"kind": "birds"}])
