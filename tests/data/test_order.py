"""The order of samples: exact for every size, a function of its numbers alone, and well mixed."""

from __future__ import annotations

import collections
import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Permutation, SampleOrder, blocks, held_out

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_is_one_for_every_size_and_key(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    image = permutation(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    assert permutation(np.array([size // 2])).tolist() == [image[size // 2]], "any place on its own"


def test_sizes_beyond_any_table_are_permuted_place_by_place() -> None:
    size = 10**18 + 9
    image = Permutation(size, 7)(size - 1 - np.arange(1000))
    assert len(set(image.tolist())) == 1000 and image.min() >= 0 and image.max() < size
    assert abs(image.mean() / size - 0.5) < 4 * math.sqrt(1 / 12 / 1000)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_permutation_of_a_few_is_as_likely_as_any_other(size: int) -> None:
    draws, kinds = 800, math.factorial(size)
    seen = collections.Counter(tuple(Permutation(size, k)(np.arange(size)).tolist()) for k in range(draws))
    chi_squared = sum(
        (seen[p] - draws / kinds) ** 2 * kinds / draws for p in itertools.permutations(range(size))
    )
    assert chi_squared < kinds - 1 + 4 * math.sqrt(2 * (kinds - 1)) + 4


@settings(max_examples=80, deadline=None)
@given(COUNTS, st.integers(1, 50))
def test_blocks_lie_in_one_shard_each_and_cover_all(counts: list[int], most: int) -> None:
    starts, shards = blocks(counts, most)
    sizes = np.diff(starts)
    assert sizes.min() >= 1 and sizes.max() <= most and starts[-1] == sum(counts)
    for place, count in enumerate(counts):
        inside = sizes[shards == place]
        assert inside.sum() == count and inside.max() - inside.min() <= 1
        assert len(inside) == math.ceil(count / most)


@settings(max_examples=25, deadline=None)
@given(COUNTS, st.integers(0, 2**63 - 1), st.integers(1, 50), st.integers(1, 300))
def test_every_sample_comes_once_per_epoch(counts: list[int], seed: int, block: int, window: int) -> None:
    order, count = SampleOrder(counts, seed, block, window), sum(counts)
    stream = order(np.arange(3 * count))
    for epoch in range(3):
        assert np.array_equal(np.sort(stream[epoch * count : (epoch + 1) * count]), np.arange(count))
    some = np.array([2 * count, 0, count - 1, count])
    assert np.array_equal(order(some), stream[some]), "any positions, in any order"


@settings(max_examples=10, deadline=None)
@given(COUNTS, st.integers(1, 20), st.integers(1, 100))
def test_what_comes_lies_in_the_shards_that_were_announced(
    counts: list[int], block: int, window: int
) -> None:
    order, count = SampleOrder(counts, 5, block, window), sum(counts)
    ends = np.cumsum(counts)
    needed = np.searchsorted(ends, order(np.arange(2 * count)), side="right")
    announced = [order.near(position) for position in range(2 * count)]
    assert all(shard in here for shard, (here, _) in zip(needed, announced, strict=True))
    for (here, following), (after, _) in itertools.pairwise(announced):
        assert after in (here, following)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [SampleOrder([25, 25], seed)(np.arange(150)).reshape(3, 50) for seed in range(3)]
    assert len({tuple(epoch.tolist()) for order in orders for epoch in order}) == 9
    assert np.array_equal(orders[1], SampleOrder([25, 25], 1)(np.arange(150)).reshape(3, 50))


def test_the_order_stays_what_it_is() -> None:
    """A change of these numbers changes what every seed means: resumed runs would repeat and skip samples."""
    assert SampleOrder([4, 4, 3], 3)(np.arange(11)).tolist() == [1, 2, 4, 0, 3, 8, 7, 9, 10, 6, 5]


def test_one_window_mixes_as_a_full_shuffle_does() -> None:
    """Correlation of place and sample has mean 0 and variance 1/(n-1); counts per cell of an 8 x 8 grid are hypergeometric."""
    n, cells = 20_000, 8
    for seed in range(5):
        image = SampleOrder([500] * (n // 500), seed)(np.arange(n))
        assert abs(np.corrcoef(image, np.arange(n))[0, 1]) < 4 / math.sqrt(n - 1)
        grid, _, _ = np.histogram2d(np.arange(n), image, bins=cells)
        chi_squared = ((grid - n / cells**2) ** 2).sum() / (n / cells**2)
        freedom = (cells - 1) ** 2
        assert abs(chi_squared - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_batch_mates_of_a_window_come_from_its_blocks_evenly() -> None:
    """Two samples of a batch share a block with probability (b-1)/(Wb-1); a full shuffle has (b-1)/(n-1)."""
    block, per_window, windows, batch = 256, 16, 4, 64
    order = SampleOrder([block] * per_window * windows, 0, block, block * per_window)
    assert order.windows == windows
    of_block = order(np.arange(order.count)) // block
    mates = [np.bincount(part) for part in of_block.reshape(-1, batch)]
    pairs = sum(int((c * (c - 1) // 2).sum()) for c in mates) / (len(mates) * batch * (batch - 1) / 2)
    expected = (block - 1) / (per_window * block - 1)
    assert pairs == pytest.approx(expected, rel=0.05) and pairs > 2 * (block - 1) / (order.count - 1)


def test_windows_take_their_blocks_from_all_over_a_sorted_dataset() -> None:
    """The mean of a window's W blocks of M has variance s^2/W (M-W)/(M-1), s^2 that of the blocks' means."""
    block, per_window, windows = 64, 16, 8
    number = per_window * windows
    squares = []
    for seed in range(30):
        order = SampleOrder([block] * number, seed, block, block * per_window)
        means = (order(np.arange(order.count)) / order.count).reshape(windows, -1).mean(1)
        squares.append(np.square(means - means.mean()).mean())
    spread = (1 - number**-2) / 12 / per_window * (number - per_window) / (number - 1)
    assert np.mean(squares) == pytest.approx(spread, rel=4 * math.sqrt(2 / (30 * (windows - 1))))


def test_memory_and_time_do_not_grow_with_the_samples() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    order = SampleOrder([10_000] * 100_000, 3)
    found = order(10**15 + np.arange(4096))
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.count == 10**9 and len(set(found.tolist())) == 4096
    assert peak < 30e6, "a table of its samples would take 8 GB"
    assert seconds < 5, "no replay of the million epochs before"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 300))
def test_held_out_samples_are_distinct_and_one_of_each_equal_part(count: int, size: int) -> None:
    size = min(size, count)
    held = held_out(count, size)
    assert held.dtype == np.int64 and len(held) == size
    assert all(count * j // size <= i < count * (j + 1) // size for j, i in enumerate(held.tolist()))
    np.testing.assert_array_equal(held, held_out(count, size))
