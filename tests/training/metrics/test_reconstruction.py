import math

import numpy as np
import pytest

from training.metrics.reconstruction import psnr, ssim


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


def test_ssim_is_its_formula_under_a_gaussian_window():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (1, 13, 12, 3), np.uint8)
    copy = np.clip(original + rng.normal(0, 20, original.shape), 0, 255).astype(np.uint8)
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / taps.sum() ** 2
    found = []
    for row, column, channel in np.ndindex(3, 2, 3):
        x, y = (
            image[0, row : row + 11, column : column + 11, channel].astype(float)
            for image in (original, copy)
        )
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
        covariance = (window * (x - mean_x) * (y - mean_y)).sum()
        found.append(
            (2 * mean_x * mean_y + 6.5025)
            * (2 * covariance + 58.5225)
            / ((mean_x**2 + mean_y**2 + 6.5025) * (var_x + var_y + 58.5225))
        )
    assert ssim(original, copy).mean == pytest.approx(np.mean(found), rel=1e-9)


def test_a_copy_has_ssim_one_and_small_pictures_are_refused():
    images = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    assert ssim(images, images).per_image.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 16x10"):
        ssim(images[:, :10], images[:, :10])
