"""Per-sample draws: functions of (seed, purpose, index) and nothing else, with the right distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.randomness import Draws

MANY = Draws(3, torch.arange(20_000))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**62), min_size=2, max_size=9), st.integers(1, 8))
def test_a_samples_numbers_do_not_depend_on_the_batch_it_comes_in(seed, index, cut):
    whole = Draws(seed, torch.tensor(index))
    parts = [Draws(seed, torch.tensor(p)) for p in (index[:cut], index[cut:]) if p]
    for draw in (
        lambda d: d.normal("noise", (3, 2)),
        lambda d: d.uniform("t"),
        lambda d: d.integers("k", 7, (2,)),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(p) for p in parts]))


def test_a_longer_draw_of_uniforms_begins_with_the_shorter_one():
    assert torch.equal(MANY.uniform("a", (3,)), MANY.uniform("a", (8,))[:, :3])


@pytest.mark.parametrize("other", [Draws(4, MANY.index), Draws(3, MANY.index + 20_000)])
def test_another_seed_or_index_gives_independent_numbers(other):
    correlation = torch.corrcoef(torch.stack([MANY.normal("a"), other.normal("a")]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(MANY.index))


def test_another_purpose_and_neighbouring_indices_give_independent_numbers():
    a, b = MANY.normal("a"), MANY.normal("b")
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(len(a))
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 4 / math.sqrt(len(a))


def test_uniforms_are_uniform():
    values = MANY.uniform("u", (5,))
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, 20, 0, 1)
    expected = values.numel() / 20
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 44  # the 0.1 % point of 19 degrees of freedom


def test_normals_have_the_moments_of_a_standard_normal():
    values = MANY.normal("n", (5,)).double()
    n = values.numel()
    assert abs(values.mean()) < 4 / math.sqrt(n)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert values.isfinite().all() and values.abs().max() < 7


def test_integers_cover_their_range_evenly():
    counts = torch.bincount(MANY.integers("i", 10), minlength=10)
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 4 * math.sqrt(2000)
