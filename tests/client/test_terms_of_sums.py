"""A client's terms in a run with secure sums: how much noise it adds by the policy's trust, and which rosters do."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedlora.privacy import Budget, calibrate
from fedlora.secure_sum.guarantee import SumGuarantee, facts_of
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.statements import Refused
from fedlora_client.terms import Limits, private_terms, with_room
from tests.contracts.test_mechanisms import plan_of
from tests.covering import few
from tests.fedlora.secure_sums import roster

VALUES, SIZE, DELTA = 5_000, 5_000, 1e-5


def plan(**changes):
    return plan_of("distributed-gaussian", **changes)


def terms(epsilon=3.0, limits=None, **changes):
    return private_terms(limits or Limits(epsilon), Budget(epsilon, DELTA, SIZE), plan(**changes))


def trusting(epsilon=3.0, least=6, **changes):
    return Limits(epsilon, trust="aggregate", least_members=least, **changes)


def roster_of(run, own, members=6):
    """Return the roster that a server makes of members who all add the noise of these terms."""
    noise = own.noise_multiplier * own.clip_norm / run.clip_norm
    grid = Grid.fitting(VALUES, clip_norm=run.clip_norm, expected_batch=run.expected_batch, members=members,
                        noise=noise)
    deviation = max(run.least_noise, noise) * (run.clip_norm / grid.step + math.sqrt(VALUES))
    return dataclasses.replace(roster(members, colluding=run.colluding), grid=grid, values=VALUES, noise=deviation)


def test_own_noise_is_what_epsilon_asks_for_unless_the_plan_asks_for_more():
    sigma = calibrate(3.0, DELTA, 0.03, 60)
    assert terms().noise_multiplier == sigma and terms().aggregate_noise_multiplier is None
    assert (terms().mechanism, terms().least_members, terms().colluding) == ("distributed-gaussian", 6, 1)
    assert terms(least_noise=2.0).noise_multiplier == 2.0
    clipped = terms(limits=Limits(3.0, max_clip_norm=0.5), least_noise=2.0)
    assert clipped.noise_multiplier == 2.0 * 2.0 / 0.5, "the least noise is in units of the plan's clip norm"


def test_where_the_owner_trusts_the_members_the_sum_has_the_noise_and_each_adds_its_share():
    own = terms(limits=trusting())
    assert own.aggregate_noise_multiplier == calibrate(3.0, 0.99 * DELTA, 0.03, 60)
    assert 0 < own.noise_multiplier - own.aggregate_noise_multiplier / 2 < 1.001e-3, "h = 5 - 1"
    assert own.epsilon(60) <= 3.0 < own.own().epsilon(60)
    more = terms(limits=trusting(least=9))
    assert more.least_members == 9 and more.noise_multiplier < own.noise_multiplier
    assert more.aggregate_noise_multiplier == own.aggregate_noise_multiplier
    assert terms(limits=trusting(least=3)).least_members == 6, "the plan asks for more than the policy"
    assert terms(limits=trusting(), least_noise=5.0).noise_multiplier == 5.0


def test_trust_in_members_changes_nothing_without_secure_sums():
    run = plan_of("dp-sgd")
    budget = Budget(3.0, DELTA, SIZE)
    assert private_terms(trusting(), budget, run) == private_terms(Limits(3.0), budget, run)


@pytest.mark.parametrize(("epsilon", "clip_norm", "members"), few(
    (3.0, 2.0, 6), (1.0, 2.0, 6), (8.0, 0.3, 6), (3.0, 0.01, 7), (0.5, 1.7, 12), (3.0, 2.0, 20)))
def test_a_roster_of_members_alike_keeps_what_is_charged_at_any_clip_norm(epsilon, clip_norm, members):
    run, own = plan(), terms(epsilon, trusting(epsilon, max_clip_norm=clip_norm))
    facts = facts_of(roster_of(run, own, members), own, pinned=True)
    assert facts.noise_multiplier >= own.aggregate_noise_multiplier
    assert facts.noise(own.sampling_rate).epsilon(DELTA, 60) <= epsilon
    deviation = own.noise_multiplier * (own.clip_norm / facts.step + math.sqrt(VALUES))
    assert deviation >= facts.deviation, "this client adds what the roster demands"


def test_a_roster_with_too_little_noise_or_members_who_are_not_pinned_is_refused():
    run, own = plan(), terms(limits=trusting())
    good = roster_of(run, own)
    facts = facts_of(good, own, pinned=True)
    assert (facts.members, facts.colluding, facts.honest, facts.digest) == (6, 1, 4, good.digest.hex())
    weak = dataclasses.replace(good, noise=0.9 * good.noise)
    with pytest.raises(Refused, match="honest members add noise of"):
        facts_of(weak, own, pinned=True)
    with pytest.raises(Refused, match="does not name the keys"):
        facts_of(good, own, pinned=False)
    with pytest.raises(Refused, match="clip_norm is 4, above"):
        facts_of(good, dataclasses.replace(own, clip_norm=4.0), pinned=True)
    assert facts_of(weak, terms(), pinned=False).noise_multiplier == SumGuarantee.of(
        weak, clip_norm=2.0, sampling_rate=0.03).noise_multiplier


def test_the_search_for_noise_that_the_lifetime_leaves_room_for_raises_what_is_charged():
    for limits in (Limits(3.0), trusting()):
        own = terms(limits=limits)
        roomy = with_room(own, lambda other: other.epsilon(60) <= 1.5)
        assert roomy.epsilon(60) <= 1.5
        charged = roomy.noise.charged
        less = roomy.with_noise(dataclasses.replace(roomy.noise, **(
            {"own": charged - 1e-3} if roomy.noise.aggregate is None else {"aggregate": charged - 1e-3})))
        assert less.epsilon(60) > 1.5
        if roomy.noise.aggregate is not None:
            facts_of(roster_of(plan(), roomy), roomy, pinned=True)
