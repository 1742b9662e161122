import numpy as np
import pytest

from training.metrics.inception_score import inception_score
from training.metrics.intervals import jackknife_interval

CLASSES = np.eye(5)


def by_definition(logits: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return float(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))


def test_sure_and_evenly_spread_pictures_score_the_number_of_classes():
    sure = 100.0 * CLASSES[np.arange(50) % 5]
    assert inception_score(sure, CLASSES).value == pytest.approx(5.0)


def test_pictures_of_one_class_score_one():
    assert inception_score(np.tile([9.0, 0, 0, 0, 0], (20, 1)), CLASSES).value == pytest.approx(1.0)


def test_it_is_its_definition_with_the_interval_of_the_jackknife():
    features, head = (
        np.random.default_rng(0).standard_normal((70, 6)),
        np.random.default_rng(1).random((5, 6)),
    )
    found = inception_score(features, head)
    assert found.value == pytest.approx(by_definition(features @ head.T), rel=1e-12)
    jackknifed = jackknife_interval(lambda kept: by_definition(features[kept] @ head.T), 70, max_blocks=16)
    assert found.interval == pytest.approx(jackknifed, rel=1e-9)


def test_splits_are_consecutive_parts_scored_apart():
    features = np.random.default_rng(2).standard_normal((70, 5))
    parts = [by_definition(part) for part in np.array_split(features, 10)]
    assert inception_score(features, CLASSES, splits=10).value == pytest.approx(np.mean(parts), rel=1e-12)


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="10 splits needs 20 images, got 19"):
        inception_score(np.ones((19, 5)), CLASSES, splits=10)
