"""Poisson sampling, and the layout of what was drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.privacy import Stream
from fedlora.training.sampling import LENGTHS, micro_batches, padded_lengths, poisson


def test_each_record_is_drawn_on_its_own_with_the_same_probability():
    stream, q, steps, records = Stream(b"k" * 32), 0.03, 4000, 50
    counts = np.zeros(records)
    sizes = np.zeros(steps)
    for step in range(steps):
        drawn = poisson(records, q, stream)
        counts[drawn] += 1
        sizes[step] = len(drawn)
    assert stats.chisquare(counts, np.full(records, counts.mean())).pvalue > 1e-3
    assert sizes.mean() == pytest.approx(records * q, rel=0.05)
    assert sizes.var() == pytest.approx(records * q * (1 - q), rel=0.1)  # binomial, not a fixed size


def test_rate_one_draws_all_and_a_tiny_rate_none():
    assert np.array_equal(poisson(7, 1.0, Stream(b"k" * 32)), np.arange(7))
    assert len(poisson(7, 1e-15, Stream(b"k" * 32))) == 0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 60), st.sampled_from([None, 512, 4096]))
def test_every_record_is_in_exactly_one_part_and_no_part_is_too_large(lengths, most, tokens):
    lengths = np.array(lengths)
    indices = np.arange(len(lengths))
    seen = []
    for length, part in micro_batches(lengths, indices, 5000, most=most, tokens=tokens):
        assert 1 <= len(part) <= most
        assert tokens is None or len(part) == 1 or len(part) * length <= tokens
        assert (lengths[part] <= length).all() and length <= 5000
        seen.extend(part)
    assert sorted(seen) == list(indices)


def test_nothing_drawn_is_nothing_to_compute():
    assert list(micro_batches(np.array([3, 4]), np.array([], dtype=np.int64), 8, most=4)) == []


def test_the_padded_length_is_a_function_of_the_records_own_length():
    lengths = np.arange(1, 3001)
    padded = padded_lengths(lengths, 3000)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    assert set(padded) <= {*LENGTHS, 2048, 3000}
    rng = np.random.default_rng(0)
    order = rng.permutation(3000)
    assert np.array_equal(padded_lengths(lengths[order], 3000), padded[order])
