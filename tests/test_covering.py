"""Tests of `tests.covering`: every two values of a grid meet in one of the chosen cases."""

import itertools

from tests.covering import covering

KINDS, TASKS, FAMILIES, PRIVATE = "abcdef", "xy", tuple("0123456789"), (True, False)


def can(kind, task, *others):
    return task == "x" or kind < "d"


def test_every_two_values_that_go_together_do_in_fewer_cases_than_the_grid_has():
    axes = (KINDS, TASKS, FAMILIES, PRIVATE)
    some, every = (covering(*axes, valid=can, whole=whole) for whole in (False, True))
    def met(cases):
        return {(i, case[i], j, case[j]) for case in cases for i, j in itertools.combinations(range(4), 2)}
    assert met(some) == met(every) and all(can(*case) for case in some)
    assert len(set(some)) == len(some) and set(some) <= set(every)
    assert len(some) < len(every) / 2 and len(some) >= len(KINDS) * len(FAMILIES)


def test_a_tuple_is_one_value_that_stands_spread_out_in_the_case():
    assert covering([("a", "x"), ("b", "y")], [1], whole=True) == [("a", "x", 1), ("b", "y", 1)]
