"""Scores of a run's parts: known vectors, and that every mean can be held against another run's."""

from __future__ import annotations

import numpy as np
import pytest

from training.metrics import scores
from training.metrics.intervals import Deletions

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
