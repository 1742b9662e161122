import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from training.metrics.frechet import frechet_distance
from training.metrics.intervals import (
    Estimate,
    frechet_estimate,
    index_blocks,
    jackknife_interval,
    mean_interval,
    share_interval,
    wilson_interval,
)
from training.metrics.moments import moments_of


@given(st.integers(2, 500), st.integers(2, 64))
def test_blocks_are_runs_that_cover_every_index_once(num_samples, max_blocks):
    blocks = index_blocks(num_samples, max_blocks)
    lengths = [len(block) for block in blocks]
    assert np.concatenate(blocks).tolist() == list(range(num_samples))
    assert len(blocks) == min(num_samples, max_blocks)
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(2, 100), st.integers(2, 40), st.integers(1, 7))
def test_no_block_parts_samples_that_belong_together(count, max_blocks, group):
    blocks = index_blocks(count * group, max_blocks, group)
    assert np.concatenate(blocks).tolist() == list(range(count * group))
    assert len(blocks) == min(count, max_blocks)
    assert all(block[0] % group == 0 and len(block) % group == 0 for block in blocks)


def test_a_single_group_is_cut_between_its_samples_and_a_part_of_one_is_refused():
    assert [len(block) for block in index_blocks(6, 32, 6)] == [1] * 6
    with pytest.raises(ValueError, match="7 samples are no whole number of groups of 3"):
        index_blocks(7, 32, 3)


def test_samples_that_repeat_within_a_group_do_not_make_an_interval_narrower():
    """Four pictures of a prompt that are all alike tell no more than one of them."""
    values = np.random.default_rng(5).standard_normal(24)
    once, four = Estimate.of_mean(values), Estimate.of_mean(np.repeat(values, 4), group=4)
    assert four.interval == pytest.approx(once.interval)
    low, high = Estimate.of_mean(np.repeat(values, 4)).interval
    assert high - low < 0.9 * (once.interval[1] - once.interval[0])


def test_a_share_has_wilsons_interval_at_its_ends_and_the_wider_one_between():
    assert share_interval(np.ones(40, bool)) == wilson_interval(40, 40)
    alternating = np.tile([True, False], 40)
    assert share_interval(alternating) == pytest.approx(wilson_interval(40, 80))
    lumped = np.repeat(np.arange(20) % 2 == 0, 4)
    low, high = share_interval(lumped, group=4)
    assert low < wilson_interval(40, 80)[0] and high > wilson_interval(40, 80)[1]
    assert share_interval(np.array([True])) == wilson_interval(1, 1)


@pytest.mark.parametrize("n", [2, 31, 64, 100, 1000])
def test_the_jackknife_of_a_mean_is_its_closed_form(n):
    values = np.random.default_rng(n).standard_normal(n) + 5.0
    jackknifed = jackknife_interval(lambda kept: float(values[kept].mean()), n)
    assert jackknifed == pytest.approx(mean_interval(values), rel=1e-10)


def test_blocks_of_one_sample_give_students_interval():
    values = np.random.default_rng(0).standard_normal(20)
    expected = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values, max_blocks=20) == pytest.approx(expected, rel=1e-10)


def test_equal_blocks_give_the_textbook_delete_a_group_jackknife():
    values = np.random.default_rng(1).gamma(2.0, size=320)
    groups = values.reshape(32, 10)
    deleted = np.array([np.var(np.delete(groups, i, axis=0)) for i in range(32)])
    variance = 31 / 32 * np.sum((deleted - deleted.mean()) ** 2)
    low, high = jackknife_interval(lambda kept: float(np.var(values[kept])), 320)
    assert (low + high) / 2 == pytest.approx(np.var(values))
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 31) * math.sqrt(variance))


def test_the_interval_of_a_mean_covers_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.standard_normal(200)) for _ in range(2000)]
    covered = np.mean([low <= 0.0 <= high for low, high in intervals])
    assert 0.935 <= covered <= 0.965


@pytest.mark.parametrize("n", [40, 331])
def test_the_cheap_frechet_interval_is_the_jackknife_of_the_distance(n):
    rng = np.random.default_rng(3)
    reference = moments_of(rng.standard_normal((400, 6)))
    features = rng.standard_normal((n, 6)) * 1.3 + 0.5
    jackknifed = jackknife_interval(
        lambda kept: frechet_distance(reference, moments_of(features[kept])).value, n
    )
    assert frechet_estimate(reference, features).interval == pytest.approx(jackknifed, rel=1e-8)
    low, high = frechet_estimate(reference, features).interval
    assert 0.0 < low < frechet_distance(reference, moments_of(features)).value < high


def test_the_frechet_interval_works_with_fewer_samples_than_dimensions():
    rng = np.random.default_rng(4)
    reference, features = moments_of(rng.standard_normal((300, 50))), rng.standard_normal((30, 50))
    low, high = frechet_estimate(reference, features).interval
    assert low < high


def test_the_wilson_interval_is_scipys():
    for successes, trials in [(0, 10), (1, 10), (45, 50), (50, 50), (512, 1000)]:
        expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_share_and_stays_within_zero_and_one(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= successes / trials <= high <= 1.0
    assert low < high


def test_what_has_no_spread_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples"):
        mean_interval(np.ones(1))
    with pytest.raises(ValueError, match="at least 2 samples"):
        jackknife_interval(lambda kept: float(len(kept)), 0)
    with pytest.raises(ValueError, match="value 1 of 3"):
        mean_interval(np.array([0.0, np.nan, 1.0]))
    for successes, trials in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="at least one trial"):
            wilson_interval(successes, trials)
