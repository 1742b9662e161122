import numpy as np
import pytest

from training.metrics.catalogue import METRICS, Sample
from training.metrics.clip_score import clip_score


def test_it_is_the_raw_cosine_of_each_pair_and_their_mean():
    images = np.array([[1.0, 0.0], [3.0, 4.0], [2.0, 0.0]])
    texts = np.array([[5.0, 0.0], [4.0, 3.0], [-1.0, 0.0]])
    score = clip_score(images, texts)
    np.testing.assert_allclose(score.per_sample, [1.0, 0.96, -1.0], rtol=1e-15)
    assert score.mean == pytest.approx(0.32)


def test_norms_do_not_matter():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 20, 8))
    scaled = clip_score(images * 7.0, texts * rng.uniform(0.1, 9.0, (20, 1)))
    np.testing.assert_allclose(scaled.per_sample, clip_score(images, texts).per_sample, rtol=1e-12)


def test_stored_half_precision_is_normalised_in_float64():
    rows = np.random.default_rng(1).standard_normal((10, 64)).astype(np.float16)
    np.testing.assert_allclose(clip_score(rows, rows).per_sample, 1.0, atol=1e-15)


def test_what_has_no_cosine_is_refused():
    ones = np.ones((3, 2))
    with pytest.raises(ValueError, match="not row-aligned"):
        clip_score(ones, ones[:2])
    with pytest.raises(ValueError, match="text embedding of sample 1 is all zeros"):
        clip_score(ones, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="sample 2 hold NaN"):
        clip_score(np.where(np.arange(3)[:, None] == 2, np.nan, ones), ones)


def test_the_two_printed_scales_clip_at_zero_before_and_after_the_mean():
    images, texts = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [-0.6, 0.8]])
    names = ("clip_score", "clip_score_x100", "clip_score_x2.5")
    found = [METRICS[name].compute(Sample(images, text=texts)).value for name in names]
    assert found == pytest.approx([0.2, 20.0, 1.25])
    away = METRICS["clip_score_x100"].compute(Sample(images, text=-images))
    assert away.value == 0.0 and away.interval == (0.0, 0.0)
