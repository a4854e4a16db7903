"""The promises of every installed schedule, with adapters of every family."""

import numpy as np
import pytest

from fedlora import registry
from fedlora_server import checkpoint
from tests.families import FAMILIES
from tests.federation import layout_of, start_of

SCHEDULES = "fedlora_strategies.schedules"
every = pytest.mark.parametrize(("name", "family"), [
    (name, family) for name in registry.keys(SCHEDULES) for family in FAMILIES])


def made(name):
    return registry.load(SCHEDULES, name).SCHEDULE()


def after(name, layout, rounds=4, seed=0):
    state, schedule = start_of(layout, 0), made(name)
    own = schedule.begin(layout, state)
    for number in range(1, rounds + 1):
        state, own = schedule.between(state, layout, own, number, np.random.default_rng((seed, number)))
    return state, own


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@every
def test_it_names_trained_tensors_alone_and_the_same_ones_whenever_it_is_asked(name, family):
    """A server that resumes a run asks for a round in the middle first."""
    layout = layout_of(family)
    rounds = [made(name).trains(number, layout) for number in range(1, 9)]
    assert all(active <= {spec.name for spec in layout.trained} for active in rounds)
    assert rounds == [made(name).trains(number, layout) for number in range(8, 0, -1)][::-1]


@every
def test_a_state_stays_one_and_is_not_written_to(name, family):
    layout = layout_of(family)
    state = start_of(layout, 0)
    schedule = made(name)
    after, _ = schedule.between(state, layout, schedule.begin(layout, state), 1, np.random.default_rng(0))
    layout.check(after, "state")
    assert same(state, start_of(layout, 0))


@every
def test_the_same_seed_gives_the_same_bits(name, family):
    one, again = (after(name, layout_of(family)) for _ in range(2))
    assert same(one[0], again[0]) and same(one[1], again[1])


@every
def test_its_memory_comes_back_from_the_checkpoint(name, family, tmp_path):
    _, own = after(name, layout_of(family))
    checkpoint.save(tmp_path, "ab" * 8, 2, {}, own)
    assert same(checkpoint.load(tmp_path).memory, own)
