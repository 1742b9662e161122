import numpy as np
import pytest

from training.metrics.moments import (
    BLOCK,
    RUN,
    Moments,
    accumulate_here,
    block_moments,
    merge,
    moments_of,
    runs,
    without,
)


def draw(n: int, width: int, *, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + offset


def same_bits(a: Moments, b: Moments) -> bool:
    return a.n == b.n and a.mean.tobytes() == b.mean.tobytes() and a.m2.tobytes() == b.m2.tobytes()


@pytest.mark.parametrize("offset", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("n", [2, 255, 256, 257, 1500])
def test_moments_agree_with_numpy_in_two_passes(n, offset):
    features = draw(n, 12, offset=offset)
    moments = moments_of(features)
    assert moments.n == n
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-13, atol=1e-13)
    scale = np.abs(np.cov(features, rowvar=False)).max()
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-12 * scale)


def test_half_and_single_precision_features_are_summed_in_float64():
    features = draw(700, 6, offset=50.0)
    for dtype in (np.float16, np.float32):
        stored = features.astype(dtype)
        assert same_bits(moments_of(stored), moments_of(stored.astype(np.float64)))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [BLOCK * 8, BLOCK * 10 + 17])
def test_the_bits_do_not_depend_on_how_blocks_were_spread_over_workers(num_workers, n):
    features = draw(n, 33).astype(np.float32)
    starts = range(0, n, BLOCK)
    owned = np.array_split(np.array(starts), num_workers)
    done = {
        start: block_moments(features[start : start + BLOCK], first_row=start)
        for starts_of_worker in reversed(owned)
        for start in starts_of_worker.tolist()
    }
    assert same_bits(merge([done[start] for start in starts]), moments_of(features))


def test_the_bits_do_not_depend_on_memory_layout():
    features = draw(600, 9)
    assert same_bits(moments_of(np.asfortranarray(features)), moments_of(features))
    assert same_bits(moments_of(np.repeat(features, 2, axis=0)[::2]), moments_of(features))


def test_aligned_subtrees_may_be_merged_first():
    blocks = [block_moments(draw(BLOCK, 5, seed=seed)) for seed in range(8)]
    halves = [merge(blocks[:4]), merge(blocks[4:])]
    assert same_bits(merge(halves), merge(blocks))


@pytest.mark.parametrize("n", [1, BLOCK, RUN, RUN + 1, 3 * RUN + 5 * BLOCK + 17, 4 * RUN])
def test_runs_merge_to_the_bits_of_the_whole(n):
    features = draw(n, 3).astype(np.float32)
    spans = runs(n)
    assert spans[0][0] == 0 and spans[-1][1] == n and len(spans) == -(-n // RUN)
    assert same_bits(merge(accumulate_here(features, spans)), moments_of(features))


def test_the_covariance_is_exactly_symmetric():
    covariance = moments_of(draw(1000, 20)).covariance
    assert np.array_equal(covariance, covariance.T)


def test_removing_a_part_leaves_the_moments_of_the_rest():
    features = draw(1000, 7, offset=10.0)
    rest = without(moments_of(features), moments_of(features[100:300]))
    expected = moments_of(np.delete(features, np.s_[100:300], axis=0))
    assert rest.n == 800
    np.testing.assert_allclose(rest.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(rest.m2, expected.m2, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(value):
    features = draw(600, 4)
    features[300, 2] = features[500, 0] = value
    with pytest.raises(ValueError, match="sample 300 "):
        moments_of(features)


@pytest.mark.parametrize(
    "features", [np.zeros((0, 4)), np.zeros(4), np.zeros((4, 4), np.uint8), np.zeros((4, 0))], ids=str
)
def test_what_is_no_matrix_of_floats_is_refused(features):
    with pytest.raises(ValueError, match="non-empty float array"):
        moments_of(features)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="at most 256 rows"):
        block_moments(np.zeros((257, 2)))
    with pytest.raises(ValueError, match="at least one block"):
        merge([])
    with pytest.raises(ValueError, match="width 2 and 3"):
        merge([moments_of(np.zeros((2, 2))), moments_of(np.zeros((2, 3)))])
    with pytest.raises(ValueError, match="at least 2 samples"):
        _ = moments_of(np.zeros((1, 2))).covariance
    whole = moments_of(draw(5, 2))
    with pytest.raises(ValueError, match="leaves none"):
        without(whole, whole)
