"""The promises of every reduction: one test suite over all that are installed."""

import numpy as np
import pytest

from fedlora import registry
from fedlora_strategies.recipe import REDUCTIONS
from fedlora_strategies.under_way import distance
from tests.federation import layout_of

pytestmark = pytest.mark.parametrize("name", registry.keys(REDUCTIONS))
LAYOUT = layout_of("lora")

SPREADS = 3.0
"""Distance of a robust result from an honest upload, at most, in units of how far honest clients go or lie apart."""


def uploads(count, seed=0):
    generator = np.random.default_rng(seed)
    return [{spec.name: generator.standard_normal(spec.shape, np.float32) for spec in LAYOUT.trained}
            for _ in range(count)]


def times(factor, tensors):
    return {key: np.float32(factor * array) for key, array in tensors.items()}


def middle(tensors):
    """Return the mean of the uploads, for what was sent."""
    return {key: np.mean([one[key] for one in tensors], axis=0, dtype=np.float64) for key in tensors[0]}


def reduced(name, tensors, weights=None, sent=None):
    gathering = registry.load(REDUCTIONS, name).REDUCTION().begin(sent or {})
    for one, weight in zip(tensors, weights or [1.0] * len(tensors), strict=True):
        gathering.add(one, weight)
    return gathering.result()


def near(one, other, tolerance=1e-6):
    return one.keys() == other.keys() and all(np.allclose(one[key], other[key], atol=tolerance) for key in one)


@pytest.mark.parametrize("sent", [None, uploads(1, seed=1)[0]], ids=["from-zero", "from-something"])
def test_uploads_that_agree_are_what_comes_out(name, sent):
    [upload] = uploads(1)
    assert near(reduced(name, [upload] * 5, [1.0, 3.0, 2.0, 7.0, 1.0], sent), upload)


def test_what_comes_out_can_be_the_next_state_and_no_upload_is_written_to(name):
    tensors = uploads(5)
    before = [{key: array.copy() for key, array in one.items()} for one in tensors]
    result = reduced(name, tensors)
    LAYOUT.check(result, "trained")
    for array in result.values():
        array += 1
    assert all(near(one, other, 0.0) for one, other in zip(tensors, before, strict=True))


def test_it_lies_within_what_was_uploaded_if_the_clients_started_there(name):
    tensors = uploads(5)
    for key, array in reduced(name, tensors, sent=middle(tensors)).items():
        together = np.stack([one[key] for one in tensors])
        assert (array >= together.min(axis=0) - 1e-6).all() and (array <= together.max(axis=0) + 1e-6).all()


def test_the_order_of_the_uploads_changes_nothing_but_rounding_and_the_same_order_nothing_at_all(name):
    tensors, weights = uploads(5), [1.0, 3.0, 2.0, 7.0, 1.0]
    one, again = reduced(name, tensors, weights), reduced(name, tensors, weights)
    assert all(np.array_equal(one[key], again[key]) for key in one)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(5)
        assert near(one, reduced(name, [tensors[i] for i in order], [weights[i] for i in order]))


@pytest.mark.parametrize("factor", [2.0**-10, -3.0, 1e4])
def test_updates_that_are_so_many_times_as_long_give_a_result_that_is(name, factor):
    tensors, weights = uploads(5), [1.0, 3.0, 2.0, 7.0, 1.0]
    scaled = reduced(name, [times(factor, one) for one in tensors], weights)
    assert near(times(1 / factor, scaled), reduced(name, tensors, weights), 1e-5)


def test_clients_that_start_elsewhere_and_move_alike_end_as_far_from_there(name):
    """What counts is the update relative to what was sent."""
    tensors, [start] = uploads(5), uploads(1, seed=1)
    moved = [{key: start[key] + array for key, array in one.items()} for one in tensors]
    result, there = reduced(name, tensors), reduced(name, moved, sent=start)
    assert near({key: there[key] - start[key] for key in there}, result, 1e-5)


@pytest.mark.parametrize("count", [5, 6, 12])
@pytest.mark.parametrize("factor", [-10.0, 1e6, 1e15, 0.0])
def test_as_many_arbitrary_uploads_as_it_withstands_do_not_take_it_far_from_the_others(name, count, factor):
    reduction = registry.load(REDUCTIONS, name).REDUCTION()
    hostile = reduction.withstands(count)
    assert 0 <= hostile < count / 2 and (not reduction.linear or hostile == 0), "a mean follows anyone"
    for seed in range(3):
        tensors = uploads(count, seed)
        sent = middle(tensors)
        honest = tensors[hostile:]
        tensors[:hostile] = [times(factor, one) for one in uploads(hostile, seed + 100)]
        result = reduced(name, tensors, sent=sent)
        apart = max(distance(one, other) for one in [*honest, sent] for other in honest)
        assert max(distance(result, one) for one in honest) <= SPREADS * apart


def test_one_arbitrary_upload_of_five_is_withstood_by_all_that_are_not_linear(name):
    reduction = registry.load(REDUCTIONS, name).REDUCTION()
    assert reduction.withstands(5) >= (0 if reduction.linear else 1) and reduction.fewest <= 5
    if not reduction.linear:
        assert reduction.fewest >= 3, "of two, neither outvotes the other"


def test_a_linear_one_needs_nothing_but_the_weighted_sum(name):
    """Two sets of uploads with the same weighted sum give the same result."""
    if not registry.load(REDUCTIONS, name).REDUCTION.linear:
        pytest.skip("it does not claim to be linear")
    tensors, weights = uploads(4), [1.0, 3.0, 2.0, 7.0]
    total = {key: sum(w * u[key].astype(np.float64) for w, u in zip(weights, tensors, strict=True)) / sum(weights)
             for key in tensors[0]}
    shifted = [{key: array.astype(np.float32) for key, array in total.items()}] * 4
    assert near(reduced(name, tensors, weights), reduced(name, shifted, weights))
