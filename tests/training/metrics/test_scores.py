"""Scores of a run's parts: known vectors, and that every mean can be held against another run's."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from data import shapes
from training.metrics import scores
from training.metrics.catalogue import METRICS, Sample
from training.metrics.frechet import Gaussian
from training.metrics.intervals import Deletions, wilson_interval

E = np.eye(4, dtype=np.float32)
"""Four directions at right angles."""


def test_a_perfect_prior_has_the_cosines_of_its_target():
    image, text = E, np.roll(E, 1, axis=0)
    found = {name: score.value for name, (score, _) in scores.prior_cosines(image, image, text).items()}
    assert found == pytest.approx(
        {
            "prior_cosine": 1.0,
            "unrelated": 0.0,
            "text_baseline": 0.0,
            "to_text": 0.0,
            "unrelated_caption": 0.0,
            "unrelated_images": 0.0,
            "difference_from_baseline": 0.0,
        }
    )


def test_a_prior_that_repeats_its_text_is_told_by_its_distance_from_the_baseline():
    image = E
    text = (E + np.roll(E, 1, axis=0)) / np.sqrt(2, dtype=np.float32)
    found = {name: score.value for name, (score, _) in scores.prior_cosines(text, image, text).items()}
    assert found["to_text"] == pytest.approx(1.0)
    assert found["prior_cosine"] == found["text_baseline"] == pytest.approx(np.sqrt(0.5))
    assert found["difference_from_baseline"] == pytest.approx(1 - np.sqrt(0.5))


def test_an_embedding_of_another_sample_is_half_the_samples_away():
    other = np.roll(E, 2, axis=0)
    found = {name: score.value for name, (score, _) in scores.prior_cosines(other, E, other).items()}
    assert (found["prior_cosine"], found["unrelated"]) == pytest.approx((0.0, 1.0))
    assert found["unrelated_caption"] == pytest.approx(0.0)


def test_reconstructions_and_the_prior_can_be_compared_with_those_of_another_run():
    """The jackknife of a mean: without each of 32 samples, what the others' mean is."""
    rng = np.random.default_rng(0)
    originals = rng.integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
    copies = np.clip(originals + rng.integers(-9, 10, originals.shape), 0, 255).astype(np.uint8)
    found = {s.name: (s, d) for s, d in scores.reconstruction_scores(originals, copies)}
    embeddings = [rng.standard_normal((32, 8)) for _ in range(3)]
    found["prior_cosine"] = scores.prior_cosines(*embeddings)["prior_cosine"]
    assert set(found) == {"vae_psnr", "vae_ssim", "prior_cosine"}
    for score, deletions in found.values():
        assert isinstance(deletions, Deletions) and deletions.sizes == (1,) * 32
        assert np.mean(deletions.values) == pytest.approx(score.value)
        assert deletions.interval(score.value) == pytest.approx((score.low, score.high))


def test_the_distance_of_reconstructions_can_be_compared_too():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 8))
    score, deletions = scores.reconstruction_fid(features, features + 0.1)
    assert score.value == pytest.approx(8 * 0.01, rel=1e-6)
    assert isinstance(deletions, Deletions) and len(deletions.sizes) == 16


SCENES = {
    "red": shapes.Scene(colour="red", shape="circle", size="large", background="white", position="left")
}
SCENES["blue"] = replace(SCENES["red"], colour="blue")
RED = {"kind": "shapes", **asdict(SCENES["red"])}


def test_what_a_recogniser_sees_is_counted_by_group_of_prompts_and_by_attribute():
    drawn = ["red", "red", "red", "blue", "red", "red", "blue", "blue"]
    truths = [RED] * 8
    truths[4:6] = [None, None]
    heldout = [False] * 4 + [True] * 4
    found = scores.judged(np.stack([shapes.render(SCENES[d]) for d in drawn]), truths, heldout, group=2)
    assert found.correct == [True, True, True, False, None, None, False, False]
    (seen, deletions), (held, _) = found.scores
    assert (seen.name, seen.value, seen.n) == ("prompt_accuracy", 0.75, 4)
    assert deletions is not None and deletions.sizes == (2, 2) and deletions.values == (0.5, 1.0)
    assert (held.name, held.value, held.n) == ("prompt_accuracy_heldout", 0.0, 2)
    assert found.attributes["colour"]["seen"].value == 0.75
    assert found.attributes["colour"]["held out"].value == 0.0
    assert found.attributes["shape"] == {
        "seen": scores.Share(value=1.0, low=wilson_interval(2, 2)[0], high=1.0, n=4),
        "held out": scores.Share(value=1.0, low=wilson_interval(1, 1)[0], high=1.0, n=2),
    }


def test_pictures_are_not_looked_at_where_no_prompt_has_a_truth():
    found = scores.judged(np.empty((0, 0, 0, 3), np.uint8), [None, None], [False, True])
    assert (found.scores, found.attributes, found.correct) == ([], {}, [None, None])


@pytest.mark.parametrize("group", [1, 4])
def test_every_metric_of_the_catalogue_has_a_jackknife_over_whole_prompts(group):
    """1,200 pictures, so that subsets of 1,000 can be drawn; an interval about each value, and the deletions it is made of."""
    rng = np.random.default_rng(0)
    real, fake, text = (rng.standard_normal((1200, 6)) for _ in range(3))
    sample = Sample(fake, Gaussian.fitted(real), real, text, head=rng.standard_normal((5, 6)), group=group)
    for name in METRICS:
        score, deletions = scores.distribution_score(name, sample)
        assert isinstance(deletions, Deletions), name
        assert sum(deletions.sizes) == 1200 and all(size % group == 0 for size in deletions.sizes), name
        assert score.low <= score.value <= score.high, name
        shares = {"precision", "recall", "coverage"}
        if name in shares or "_recall_" in name:
            assert 0 <= score.low < score.high <= 1, name
        else:
            assert score.high == pytest.approx(deletions.interval(score.value)[1], abs=1e-9), name
