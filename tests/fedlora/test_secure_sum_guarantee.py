"""What the sums of a run promise: against the design's figures and a second accountant."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedlora.privacy.accounting import calibrate, pld_epsilon
from fedlora.privacy.mechanisms.distributed_gaussian import _of_several
from fedlora.privacy.spend import Spend
from fedlora.secure_sum.guarantee import SumGuarantee
from fedlora.secure_sum.integers import Grid
from tests.covering import few
from tests.fedlora.secure_sums import roster

VALUES, Q, ROUNDS, DELTA = 10_000, 256 / 8500, 80, 1e-5


def guarantee(members: int, colluding: int, sigma: float, *, clip_norm: float = 1.0) -> SumGuarantee:
    grid = Grid.fitting(VALUES, clip_norm=1.0, expected_batch=256, members=members, noise=sigma)
    noise = sigma * grid.sensitivity(VALUES, 1.0)
    of = dataclasses.replace(roster(members, colluding=colluding), grid=grid, values=VALUES, noise=noise)
    return SumGuarantee.of(of, clip_norm=clip_norm, sampling_rate=Q)


@pytest.mark.parametrize("members, colluding, expected", few(
    (6, 1, 1.43), (3, 0, 1.96), (6, 0, 1.14), (20, 0, 0.52), (20, 6, 0.77), (100, 0, 0.20), (100, 33, 0.30)))
def test_a_local_epsilon_of_eight_becomes_in_the_sum_what_the_design_says(members, colluding, expected):
    sigma = calibrate(8.0, DELTA, Q, ROUNDS)
    assert sigma == pytest.approx(0.579, abs=2e-3)
    assert guarantee(members, colluding, sigma).epsilon(DELTA, ROUNDS) == pytest.approx(expected, abs=0.02)


def test_the_multiplier_of_the_sum_is_the_clients_times_the_root_of_the_honest_shares():
    """Rounding raises sensitivity and noise alike, so it drops out."""
    own = guarantee(6, 1, 0.6)
    assert own.noise_multiplier == pytest.approx(0.6 * math.sqrt(4))
    assert guarantee(6, 1, 0.6, clip_norm=0.5).noise_multiplier > 1.9 * own.noise_multiplier
    with pytest.raises(ValueError, match="clip_norm is 2, above the 1"):
        guarantee(6, 1, 0.6, clip_norm=2.0)


def test_a_second_accountant_agrees():
    own = guarantee(6, 0, 0.6)
    spent = Spend(own.noise_multiplier, Q, ROUNDS)
    assert own.epsilon(DELTA, ROUNDS) == pytest.approx(pld_epsilon((spent,), 0.99 * DELTA), rel=0.01)
    assert own.epsilon(DELTA, 0) == 0.0


def test_one_persons_records_at_several_clients_cost_more_than_one_and_less_than_as_one_unit_always_sampled_together():
    own = guarantee(6, 0, 0.6)
    one, two = (own.epsilon(DELTA, ROUNDS, clients=clients) for clients in (1, 2))
    together = Spend(own.noise_multiplier / 2, 1 - (1 - Q)**2, ROUNDS)
    assert one < two < pld_epsilon((together,), 0.99 * DELTA)
    mixture = _of_several(own.noise_multiplier, Q, 1.0, 0.99 * DELTA, ROUNDS, 1)
    assert mixture == pytest.approx(one, rel=0.02), "a mixture of one is no mixture"


@pytest.mark.parametrize("clients", [2, 3])
def test_other_clients_that_clip_less_tightly_move_the_sum_further(clients):
    """With every unit in every step it is one Gaussian, moved once by this client and `others` by each of the rest."""
    lower = dataclasses.replace(guarantee(6, 1, 0.6, clip_norm=0.25), sampling_rate=1.0)
    assert lower.others == pytest.approx(4, rel=0.02) and guarantee(6, 1, 0.6).others == 1
    moved = Spend(lower.noise_multiplier / (1 + (clients - 1) * lower.others), 1.0, 3)
    assert lower.epsilon(DELTA, 3, clients=clients) == pytest.approx(pld_epsilon((moved,), 0.99 * DELTA), rel=0.01)


def test_two_clients_cost_a_person_no_less_than_the_records_at_either():
    lower, usual = guarantee(6, 1, 0.6, clip_norm=0.25), guarantee(6, 1, 0.6)
    two = lower.epsilon(DELTA, ROUNDS, clients=2)
    assert two > usual.epsilon(DELTA, ROUNDS) > lower.epsilon(DELTA, ROUNDS)


def test_a_grid_that_is_too_coarse_for_delta_is_refused():
    coarse = dataclasses.replace(guarantee(6, 0, 0.6), deviation=2.0)
    with pytest.raises(ValueError, match="give a lower --epsilon"):
        coarse.epsilon(DELTA, ROUNDS)
