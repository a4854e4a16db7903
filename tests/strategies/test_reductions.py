"""The promises of every reduction: one test suite over all that are installed."""

import numpy as np
import pytest

from fedlora import registry
from tests.federation import layout_of

REDUCTIONS = "fedlora_strategies.reductions"
pytestmark = pytest.mark.parametrize("name", registry.keys(REDUCTIONS))
LAYOUT = layout_of("lora")


def uploads(count, seed=0):
    generator = np.random.default_rng(seed)
    return [{spec.name: generator.standard_normal(spec.shape, np.float32) for spec in LAYOUT.trained}
            for _ in range(count)]


def reduced(name, tensors, weights=None):
    gathering = registry.load(REDUCTIONS, name).REDUCTION().begin()
    for one, weight in zip(tensors, weights or [1.0] * len(tensors), strict=True):
        gathering.add(one, weight)
    return gathering.result()


def near(one, other):
    return one.keys() == other.keys() and all(np.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_uploads_that_agree_are_what_comes_out(name):
    [upload] = uploads(1)
    assert near(reduced(name, [upload] * 5, [1.0, 3.0, 2.0, 7.0, 1.0]), upload)


def test_what_comes_out_can_be_the_next_state_and_no_upload_is_written_to(name):
    tensors = uploads(5)
    before = [{key: array.copy() for key, array in one.items()} for one in tensors]
    LAYOUT.check(reduced(name, tensors), "trained")
    assert all(near(one, other) for one, other in zip(tensors, before, strict=True))


def test_it_lies_within_what_was_uploaded(name):
    tensors = uploads(5)
    for key, array in reduced(name, tensors).items():
        together = np.stack([one[key] for one in tensors])
        assert (array >= together.min(axis=0) - 1e-6).all() and (array <= together.max(axis=0) + 1e-6).all()


def test_the_order_of_the_uploads_changes_nothing_but_rounding_and_the_same_order_nothing_at_all(name):
    tensors, weights = uploads(5), [1.0, 3.0, 2.0, 7.0, 1.0]
    one, again = reduced(name, tensors, weights), reduced(name, tensors, weights)
    assert all(np.array_equal(one[key], again[key]) for key in one)
    assert near(one, reduced(name, tensors[::-1], weights[::-1]))


def test_a_linear_one_needs_nothing_but_the_weighted_sum(name):
    """Two sets of uploads with the same weighted sum give the same result."""
    if not registry.load(REDUCTIONS, name).REDUCTION.linear:
        pytest.skip("it does not claim to be linear")
    tensors, weights = uploads(4), [1.0, 3.0, 2.0, 7.0]
    total = {key: sum(w * u[key].astype(np.float64) for w, u in zip(weights, tensors, strict=True)) / sum(weights)
             for key in tensors[0]}
    shifted = [{key: array.astype(np.float32) for key, array in total.items()}] * 4
    assert near(reduced(name, tensors, weights), reduced(name, shifted, weights))
