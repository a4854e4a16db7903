"""The promises of every installed refactorization, with adapters of every family that it works with."""

import numpy as np
import pytest

from fedlora import registry
from fedlora_server import checkpoint
from tests.families import FAMILIES
from tests.federation import layout_of, start_of, update_of

REFACTORIZATIONS = "fedlora_strategies.refactorizations"
NAMES = registry.keys(REFACTORIZATIONS)


def serves(name, family):
    try:
        registry.load(REFACTORIZATIONS, name).REFACTORIZATION().check(layout_of(family))
    except ValueError:
        return False
    return True


every = pytest.mark.parametrize(("name", "family"), [
    (name, family) for name in NAMES for family in FAMILIES if serves(name, family)])


def learned(layout, seed=0):
    generator = np.random.default_rng(seed)
    return start_of(layout, 0) | {spec.name: generator.standard_normal(spec.shape, np.float32)
                                  for spec in layout.trained}


def applied(name, layout, state, rounds=3):
    """Return the result of `rounds` rounds without training, and the factors of the last one."""
    part = registry.load(REFACTORIZATIONS, name).REFACTORIZATION()
    own, factors = part.begin(layout, state), {}
    for number in range(1, rounds + 1):
        state, own, factors = part.apply(state, layout, own, number, np.random.default_rng(number))
    return state, own, factors


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_each_serves_some_family():
    assert all(any(serves(name, family) for family in FAMILIES) for name in NAMES)


@every
def test_the_update_stays_as_it_is_and_the_state_can_be_gone_on_with(name, family):
    layout = layout_of(family)
    state = learned(layout)
    after, _, _ = applied(name, layout, state)
    layout.check(after, "state")
    for module in layout.modules:
        np.testing.assert_allclose(update_of(after, module), update_of(state, module), atol=1e-6)
    assert all(np.array_equal(after[spec.name], state[spec.name]) for spec in layout.state if spec.group == "head")


@every
def test_what_has_learned_nothing_is_left_alone(name, family):
    layout = layout_of(family)
    state = start_of(layout, 0)
    after, _, factors = applied(name, layout, state)
    assert same(after, state) and not factors


@every
def test_the_same_state_gives_the_same_bits_and_is_not_written_to(name, family):
    layout = layout_of(family)
    state, untouched = learned(layout), learned(layout)
    one, again = applied(name, layout, state), applied(name, layout, state)
    assert same(one[0], again[0]) and same(one[1], again[1]) and same(state, untouched)


@every
def test_a_factor_takes_the_old_values_to_the_new_ones(name, family):
    """An optimizer's moments, which are directions of the values, can therefore be rotated along."""
    layout = layout_of(family)
    state = learned(layout)
    after, _, factors = applied(name, layout, state, rounds=1)
    trained = {spec.name for spec in layout.trained}
    assert factors.keys() <= trained
    assert {key for key in trained if not np.array_equal(after[key], state[key])} <= factors.keys()
    for key, factor in factors.items():
        if factor is not None:
            np.testing.assert_allclose(state[key] @ factor, after[key], atol=1e-5)


@every
def test_its_memory_comes_back_from_the_checkpoint(name, family, tmp_path):
    layout = layout_of(family)
    _, own, _ = applied(name, layout, learned(layout))
    checkpoint.save(tmp_path, "ab" * 8, 2, {}, own)
    assert same(checkpoint.load(tmp_path).memory, own)


def test_svd_refuses_adapters_that_are_no_product_of_two():
    with pytest.raises(ValueError, match=r"have .*\.R"):
        registry.load(REFACTORIZATIONS, "svd").REFACTORIZATION().check(layout_of("bra"))
