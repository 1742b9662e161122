import math

import numpy as np
import pytest

from training.metrics.reconstruction import psnr


def test_it_is_the_decibels_of_the_squared_range_over_the_mean_squared_error():
    originals = np.full((2, 4, 4, 3), 100, np.uint8)
    reconstructions = originals.copy()
    reconstructions[0] += 10  # MSE 100
    reconstructions[1, 0, 0, 0] -= 24  # MSE 24^2 / 48 = 12
    result = psnr(originals, reconstructions)
    expected = [10 * math.log10(255**2 / 100), 10 * math.log10(255**2 / 12)]
    np.testing.assert_allclose(result.per_image, expected, rtol=1e-14)
    assert result.mean == pytest.approx(sum(expected) / 2)
    assert result.num_exact == 0


def test_differences_do_not_wrap_around():
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(black, white).mean == 0.0
    assert psnr(white, black).mean == 0.0


def test_an_exact_copy_scores_as_one_value_off_by_one_level_and_is_counted():
    originals = np.zeros((2, 4, 4, 3), np.uint8)
    reconstructions = originals.copy()
    reconstructions[1, 0, 0, 0] = 1
    result = psnr(originals, reconstructions)
    assert result.per_image[0] == result.per_image[1] == pytest.approx(10 * math.log10(255**2 * 48))
    assert result.num_exact == 1


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)],
    ids=["float", "channels first", "none"],
)
def test_only_uint8_pictures_are_taken(images):
    with pytest.raises(ValueError, match="non-empty uint8 array"):
        psnr(images, images)


def test_originals_and_reconstructions_must_pair_up():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="do not pair up"):
        psnr(images, images[:1])
