import numpy as np
import pytest

from training.metrics.extrapolation import frechet_at_infinity
from training.metrics.frechet import Gaussian, frechet_distance
from training.metrics.moments import Moments


def standard(width: int) -> Gaussian:
    return Gaussian.of(Moments(n=100_000, mean=np.zeros(width), m2=np.eye(width) * 99_999))


def test_the_bias_of_a_finite_sample_is_extrapolated_away():
    features = np.random.default_rng(0).standard_normal((1600, 24))
    biased = frechet_distance(standard(24), Gaussian.fitted(features)).value
    found = frechet_at_infinity(standard(24), features)
    assert biased > 0.05
    assert abs(found.value) < 0.2 * biased
    assert found.interval[0] < 0.0 < found.interval[1]
    assert found.residual < 0.2 * biased
    assert found.sizes[0] == 400 and found.sizes[-1] == 1600


def test_a_shift_is_kept():
    features = np.random.default_rng(1).standard_normal((1600, 6)) + 2.0
    assert frechet_at_infinity(standard(6), features).value == pytest.approx(24.0, rel=0.05)


def test_it_draws_the_same_subsets_again():
    features = np.random.default_rng(2).standard_normal((200, 5))
    assert frechet_at_infinity(standard(5), features) == frechet_at_infinity(standard(5), features)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 64 generated images, got 63"):
        frechet_at_infinity(standard(5), np.zeros((63, 5)))
