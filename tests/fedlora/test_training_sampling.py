"""Poisson sampling, and the split of drawn records into micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedlora.privacy import RandomStream
from fedlora.training.sampling import (
    LENGTHS,
    Sampler,
    lengths_up_to,
    micro_batches,
    padded_lengths,
    poisson,
    records_at_once,
)


def test_each_record_is_drawn_on_its_own_with_the_same_probability():
    stream, q, steps, records = RandomStream(b"k" * 32), 0.03, 4000, 50
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
    assert np.array_equal(poisson(7, 1.0, RandomStream(b"k" * 32)), np.arange(7))
    assert len(poisson(7, 1e-15, RandomStream(b"k" * 32))) == 0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 60), st.sampled_from([None, 512, 4096]))
def test_every_record_is_in_exactly_one_part_and_no_part_is_too_large(lengths, most, tokens):
    lengths = np.array(lengths)
    indices = np.arange(len(lengths))
    seen = []
    for length, part in micro_batches(lengths, indices, 5000, lambda length: records_at_once(length, most, tokens)):
        assert 1 <= len(part) <= most
        assert tokens is None or len(part) == 1 or len(part) * length <= tokens
        assert (lengths[part] <= length).all() and length <= 5000
        seen.extend(part)
    assert sorted(seen) == list(indices)


def test_nothing_drawn_is_nothing_to_compute():
    assert list(micro_batches(np.array([3, 4]), np.array([], dtype=np.int64), 8, lambda length: 4)) == []


def test_the_padded_length_is_a_function_of_the_records_own_length():
    lengths = np.arange(1, 3001)
    padded = padded_lengths(lengths, 3000)
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all()
    assert set(padded) <= {*LENGTHS, 2048, 3000}
    rng = np.random.default_rng(0)
    order = rng.permutation(3000)
    assert np.array_equal(padded_lengths(lengths[order], 3000), padded[order])


@given(st.integers(1, 3000))
def test_the_padded_lengths_of_a_plan_are_those_that_its_records_can_have(max_length):
    assert lengths_up_to(max_length) == sorted(set(padded_lengths(np.arange(1, max_length + 1), max_length)))
    assert lengths_up_to(max_length)[-1] == max_length


def _draws(units, rate, k, steps, key=b"k" * 32):
    sampler = Sampler(len(units), np.asarray(units), rate, k, RandomStream(key))
    return [sampler.draw() for _ in range(steps)]


def test_rows_as_units_are_drawn_by_the_same_numbers_as_ever():
    stream = RandomStream(b"k" * 32)
    sampler = Sampler(50, None, 0.3, 8, RandomStream(b"k" * 32))
    for _ in range(20):
        draw = sampler.draw()
        assert np.array_equal(draw.indices, poisson(50, 0.3, stream)) and draw.owners is None
        assert len(draw) == len(draw.indices) and (draw.weights == 1).all()


def test_each_unit_is_drawn_on_its_own_with_the_same_probability_whatever_its_size():
    units = np.repeat(np.arange(6), [1, 2, 3, 5, 20, 100])
    counts, sizes, steps, q = np.zeros(6), [], 4000, 0.2
    for draw in _draws(units, q, 2, steps):
        counts[np.unique(units[draw.indices])] += 1
        sizes.append(len(draw))
        assert len(np.unique(units[draw.indices])) == len(draw)
    assert (abs(counts - steps * q) < 4 * (steps * q * (1 - q)) ** 0.5).all()
    assert np.mean(sizes) == pytest.approx(6 * q, rel=0.05)
    assert np.var(sizes) == pytest.approx(6 * q * (1 - q), rel=0.1)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 9), st.floats(0.01, 1.0))
def test_a_unit_gives_at_most_k_of_its_own_records_each_once(labels, k, rate):
    units = np.unique(labels, return_inverse=True)[1]
    for draw in _draws(units, rate, k, 3):
        assert len(set(draw.indices.tolist())) == len(draw.indices) == len(draw.owners)
        for owner in range(len(draw)):
            mine = draw.indices[draw.owners == owner]
            assert len(set(units[mine].tolist())) == 1
            assert len(mine) == min(k, np.sum(units == units[mine[0]]))
        assert np.array_equal(draw.owners, np.sort(draw.owners))


def test_all_subsets_of_a_unit_are_equally_likely():
    seen: dict[frozenset, int] = {}
    for draw in _draws([0] * 6, 1.0, 3, 8000):
        subset = frozenset(draw.indices.tolist())
        seen[subset] = seen.get(subset, 0) + 1
    assert len(seen) == 20 and stats.chisquare(list(seen.values())).pvalue > 1e-3


def test_a_units_fate_and_choice_do_not_depend_on_the_others_records():
    before = np.array([0] * 9 + [1] * 7 + [2] * 3)
    after = np.array([0] * 2 + [1] * 7 + [2] * 30)
    fates = 0
    for one, other in zip(_draws(before, 0.5, 4, 60), _draws(after, 0.5, 4, 60), strict=True):
        mine = [draw.indices[units[draw.indices] == 1] - np.flatnonzero(units == 1)[0]
                for draw, units in ((one, before), (other, after))]
        assert np.array_equal(*mine)
        fates += len(mine[0]) > 0
    assert 15 < fates < 45


def test_the_choice_is_new_in_each_step_and_repeats_with_the_stream():
    first, again = _draws([0] * 30, 1.0, 5, 20), _draws([0] * 30, 1.0, 5, 20)
    assert all(np.array_equal(a.indices, b.indices) for a, b in zip(first, again, strict=True))
    assert len({tuple(sorted(draw.indices)) for draw in first}) == 20
