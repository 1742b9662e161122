"""The order of samples: exact for every size, and a function of its numbers alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import held_out


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 300))
def test_held_out_samples_are_distinct_and_one_of_each_equal_part(count: int, size: int) -> None:
    size = min(size, count)
    held = held_out(count, size)
    assert held.dtype == np.int64 and len(held) == size
    assert all(count * j // size <= i < count * (j + 1) // size for j, i in enumerate(held.tolist()))
    np.testing.assert_array_equal(held, held_out(count, size))
