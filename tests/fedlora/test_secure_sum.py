"""The masked sum is the plain integer sum, whoever drops out and whenever; and nobody learns more than that sum."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from scipy import stats

from fedlora.identity.certificates import parse_certificate, utc_now
from fedlora.privacy.rng import RandomStream
from fedlora.privacy.rounding import rounding_delta, rounding_distance
from fedlora.secure_sum import shamir
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.masks import mask, public_bytes
from fedlora.secure_sum.member import own_mask_key
from fedlora.secure_sum.packages import Closing
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.secure_sum.rounding import MOST_DEVIATIONS, rounded_noise
from fedlora.secure_sum.statements import Refused, digest, sign
from fedlora_server.pki.authority import Authority
from tests.covering import covering
from tests.fedlora.secure_sums import (
    RUN,
    SENT,
    Sum,
    attendance,
    authority,
    authority_pem,
    identity_of,
    people,
    roster,
    seeded,
)

PHASES = ("packages", "requests", "collect", "close", "reveal")


def run(total: Sum, phase_of: dict[str, str]) -> np.ndarray | None:
    """Run a sum in which each of these names drops out before its phase, with another server in every phase.

    Returns:
        The opened sum; None if too few were left in some phase.
    """
    gone: set[str] = set()
    for phase in PHASES:
        gone |= {name for name, last in phase_of.items() if last == phase}
        try:
            getattr(total, phase)(gone)
        except Refused:
            return None
        total.restart()
    return total.collector.opened()


@pytest.mark.parametrize("members, gone, phase, ring_bits", covering((3, 6), (0, 1, 2), PHASES, (32, 64)))
def test_the_masked_sum_is_the_plain_sum_of_whose_uploads_were_taken(members, gone, phase, ring_bits):
    of = roster(members, ring_bits=ring_bits)
    total = Sum(of)
    opened = run(total, dict.fromkeys(list(of.members)[:gone], phase))
    if members - gone < of.threshold:
        assert opened is None
    else:
        np.testing.assert_array_equal(opened, total.expected())
        assert len(total.collector.held.uploaded) == members - (gone if phase in PHASES[:3] else 0)


def test_members_may_drop_out_in_every_phase_of_one_sum():
    of = roster(20)
    total = Sum(of)
    opened = run(total, dict(zip(of.members, PHASES, strict=False)))
    np.testing.assert_array_equal(opened, total.expected())
    assert len(total.collector.held.uploaded) == 17


def test_more_dropouts_than_the_threshold_allows_leave_the_sum_closed_for_ever():
    of = roster(6)
    total = Sum(of)
    assert run(total, dict.fromkeys(list(of.members)[:2], "reveal")) is None, "four revealed, and it takes five"
    assert not any(total.members[name].revealed for name in list(of.members)[:2])


def test_sums_of_negative_values_wrap_around_and_come_back():
    of = roster(3, values=4)
    total = Sum(of)
    total.vectors = {name: np.full(4, -(1 << 18)) for name in of.members}
    np.testing.assert_array_equal(run(total, {}), np.full(4, -3 << 18))


# What the server can see

def test_a_late_upload_stays_masked_though_its_pairwise_masks_were_opened():
    """A server that calls a client dropped, and holds its upload, gets the pairwise masks and not the client's own."""
    of = roster(6)
    total = Sum(of)
    late = next(iter(of.members))
    total.packages()
    total.requests()
    total.collect({late})
    total.close()
    total.reveal()
    np.testing.assert_array_equal(total.collector.opened(), total.expected())
    assert all(late not in reveal.seeds and late in reveal.keys for reveal in total.collector.held.reveals.values())
    with pytest.raises(Refused, match="came after the sum was closed"):
        total.collector.add_upload(late, total.uploads[late])
    with pytest.raises(Refused, match=r"asked to open a sum .* it is not part of"):
        total.members[late].agree(total.collector.held.survivors)


# What an active server cannot do

def prepared(members: int = 6, **options: int) -> Sum:
    total = Sum(roster(members), **options)
    total.packages()
    total.requests()
    total.collect()
    return total


def test_a_member_signs_one_set_only():
    total = prepared()
    names = tuple(total.members)
    first = total.members[names[0]]
    first.agree(names)
    with pytest.raises(Refused, match="closed already with other clients"):
        first.agree(names[:5])


def test_a_member_reveals_nothing_for_a_set_that_too_few_signed():
    total = prepared()
    names = tuple(total.members)
    signatures = {name: total.members[name].agree(names) for name in names}
    few = dict(list(signatures.items())[:4])
    with pytest.raises(Refused, match=r"4 clients signed .* and 5 must"):
        total.members[names[0]].reveal(Closing(names, few))
    forged = dict.fromkeys(names, signatures[names[0]])
    with pytest.raises(Refused, match="1 clients signed"):
        total.members[names[0]].reveal(Closing(names, forged))
    with pytest.raises(Refused, match="did not agree to this set"):
        total.members[names[0]].reveal(Closing(names[:5], signatures))


def test_signatures_of_two_attempts_do_not_add_up():
    """The signatures of an earlier attempt with the same survivors are worth nothing in this one."""
    first, second = prepared(), prepared(attempt=2)
    names = tuple(first.members)
    old = {name: first.members[name].agree(names) for name in names}
    second.members[names[0]].agree(names)
    with pytest.raises(Refused, match="0 clients signed"):
        second.members[names[0]].reveal(Closing(names, old))


def test_a_server_that_shows_members_different_cohorts_opens_nothing():
    of = roster(6)
    total = Sum(of)
    total.packages()
    requests = total.collector.form_cohort(SENT)
    names = list(of.members)
    smaller = {name: dataclasses.replace(requests[name], cohort=tuple(
        keys for keys in requests[name].cohort if keys.name != names[5])) for name in names}
    for name in names[:3]:
        total.members[name].accept(requests[name], SENT)
    for name in names[3:5]:
        total.members[name].accept(smaller[name], SENT)
    for name in names[:5]:
        total.members[name].masked(total.vectors[name])
    survivors = tuple(names[:5])
    signatures = {name: total.members[name].agree(survivors) for name in survivors}
    for name, valid in ((names[0], 3), (names[4], 2)):
        with pytest.raises(Refused, match=f"{valid} clients signed"):
            total.members[name].reveal(Closing(survivors, signatures))


def test_a_member_takes_part_in_one_cohort_of_an_attempt_and_masks_one_vector():
    total = prepared()
    name = next(iter(total.members))
    member, request = total.members[name], total.collector.form_cohort(SENT)[name]
    member.accept(request, SENT)
    with pytest.raises(Refused, match="second cohort"):
        member.accept(dataclasses.replace(request, cohort=request.cohort[:5]), SENT)
    with pytest.raises(Refused, match="serve one vector only"):
        member.masked(total.vectors[name])


def test_a_cohort_below_the_threshold_is_refused():
    of = roster(6)
    total = Sum(of)
    total.packages()
    name = next(iter(of.members))
    request = total.collector.form_cohort(SENT)[name]
    with pytest.raises(Refused, match=r"has 4 clients, .* must have 5"):
        total.members[name].accept(dataclasses.replace(request, cohort=request.cohort[:4]), SENT)


def test_an_old_package_a_changed_one_and_tensors_of_another_round_are_refused():
    of = roster(3)
    old, now = Sum(of), Sum(of, attempt=2)
    for total in (old, now):
        total.packages()
    names = list(of.members)
    fresh, past = (total.collector.form_cohort(SENT)[names[0]] for total in (now, old))
    member = now.members[names[0]]
    with pytest.raises(Refused, match="'site-002' was not made for attempt 2 at round 1"):
        member.accept(dataclasses.replace(fresh, cohort=(*fresh.cohort[:2], past.cohort[2])), SENT)
    with pytest.raises(Refused, match="does not hold the key package that 'site-000' gave"):
        member.accept(dataclasses.replace(fresh, cohort=(past.cohort[0], *fresh.cohort[1:])), SENT)
    with pytest.raises(Refused, match="sealed for 'site-000' cannot be opened"):
        member.accept(dataclasses.replace(fresh, sealed=fresh.sealed | {names[1]: past.sealed[names[1]]}), SENT)
    with pytest.raises(Refused, match="not those that its cohort starts from"):
        member.accept(fresh, b"other tensors")
    with pytest.raises(Refused, match="not signed for this round and attempt"):
        now.collector.add_package(old.members[names[0]].offer())
    member.accept(fresh, SENT)


def test_the_server_refuses_what_would_make_the_sum_wrong():
    total = prepared(3)
    names = list(total.members)
    before = total.collector.held.total.copy()
    total.collector.add_upload(names[0], total.uploads[names[0]])
    np.testing.assert_array_equal(total.collector.held.total, before), "a repeated upload counts once"
    with pytest.raises(Refused, match="must be uint32 of shape"):
        total.collector.add_upload(names[0], np.zeros(3, np.uint32))
    with pytest.raises(Refused, match="not in the cohort"):
        total.collector.add_upload("stranger", total.uploads[names[0]])
    total.close()
    closing = total.collector.closing()
    reveals = [total.members[name].reveal(closing) for name in names]
    with pytest.raises(Refused, match="not those of this sum"):
        total.collector.add_reveal(dataclasses.replace(reveals[0], seeds={}))
    false = reveals[0].seeds | {names[1]: bytes(32)}
    for reveal in (dataclasses.replace(reveals[0], seeds=false), *reveals[1:]):
        total.collector.add_reveal(reveal)
    with pytest.raises(Refused, match=r"a secret cannot be recovered|revealed false ones"):
        total.collector.opened()


def test_keys_with_which_all_agree_on_one_mask_are_refused_before_anything_is_charged():
    """A public key of low order makes everybody's agreed key the same, so that it would hide nothing."""
    of = roster(3)
    total, names = Sum(of), list(of.members)
    total.packages()
    request = total.collector.form_cohort(SENT)[names[0]]
    for useless in (bytes(32), bytes(5)):
        keys = dataclasses.replace(request.cohort[1], mask_key=useless)
        signed = dataclasses.replace(keys, signature=sign(people(3)[names[1]][0], keys.statement(
            total.collector.attempt)))
        changed = dataclasses.replace(request, cohort=(request.cohort[0], signed, request.cohort[2]))
        with pytest.raises(Refused, match="mask key of 'site-001' is no usable"):
            total.members[names[0]].accept(changed, SENT)
        package = dataclasses.replace(total.members[names[1]].offer(), keys=signed)
        with pytest.raises(Refused, match="mask key of 'site-001' is no usable"):
            Sum(of).collector.add_package(package)
        key, _, entry = people(3)["site-002"]
        third = Entry.signed("site-002", entry.certificate, useless, RUN, key)
        with pytest.raises(Refused, match="sealing key of 'site-002' is no usable"):
            check(dataclasses.replace(of, entries=(*of.entries[:2], third)))


# Rosters

def check(of: Roster, **options: object) -> None:
    own = people(len(of.entries))["site-000"][2]
    of.check(own, authority_pem(), utc_now(), **options)


def test_a_roster_is_checked_against_authority_pins_and_least_number():
    of = roster(3)
    check(of)
    pins = [parse_certificate(entry.certificate).fingerprint for entry in of.entries]
    check(of, pins=pins, least=3)
    with pytest.raises(Refused, match="'site-002' is in the roster and is none of the members"):
        check(of, pins=pins[:2])
    with pytest.raises(Refused, match=r"has 3 members, .* with 4 or more"):
        check(of, least=4)


def test_an_invented_member_a_changed_key_and_a_foreign_certificate_are_refused(tmp_path):
    of = roster(3)
    key, sealing, entry = people(3)["site-002"]
    def with_third(third: Entry) -> Roster:
        return dataclasses.replace(of, entries=(*of.entries[:2], third))
    foreign = identity_of("site-002", Authority.create(tmp_path / "pki", ["127.0.0.1"]))
    with pytest.raises(Refused, match="does not come from the authority"):
        check(with_third(Entry.signed("site-002", foreign.chain_pem, public_bytes(sealing), RUN,
                                      load_pem_private_key(foreign.key_pem, None))))
    with pytest.raises(Refused, match="not signed by its certificate's key for this run"):
        check(with_third(dataclasses.replace(entry, sealing_key=people(3)["site-001"][2].sealing_key)))
    with pytest.raises(Refused, match="not signed by its certificate's key for this run"):
        check(with_third(Entry.signed("site-002", entry.certificate, entry.sealing_key, b"another run", key)))
    with pytest.raises(Refused, match="is that of 'site-001'"):
        check(with_third(dataclasses.replace(entry, certificate=people(3)["site-001"][2].certificate)))
    with pytest.raises(Refused, match="as this site sent it"):
        of.check(dataclasses.replace(of.entries[0], sealing_key=entry.sealing_key), authority_pem(), utc_now())


@pytest.mark.parametrize(("members", "liars", "opens"), [(6, 1, True), (6, 2, False), (3, 1, False)])
def test_a_member_that_reveals_false_shares_is_named_if_enough_others_revealed_theirs(members, liars, opens):
    total = Sum(roster(members))
    total.packages(), total.requests(), total.collect(), total.close(), total.reveal()
    reveals = total.collector.held.reveals
    for name in list(reveals)[:liars]:
        false = {one: bytes(32) for one in reveals[name].seeds}
        reveals[name] = dataclasses.replace(reveals[name], seeds=false)
    if opens:
        assert np.array_equal(total.collector.opened(), total.expected())
        assert total.collector.doubted == next(iter(reveals))
    else:
        with pytest.raises(Refused, match=r"the revealed shares do not give|cannot be recovered"):
            total.collector.opened()
        assert total.collector.doubted is None


def test_a_key_that_the_authority_certifies_under_two_names_is_not_two_members():
    of, (key, sealing, _) = roster(3), people(3)["site-001"]
    double = Entry.signed("twin", authority().admit("twin", key.public_key()).pem, public_bytes(sealing), RUN, key)
    pins = [parse_certificate(entry.certificate).fingerprint for entry in of.entries]
    with pytest.raises(Refused, match="'site-001' and 'twin' are in the roster with the same key"):
        check(dataclasses.replace(of, entries=(*of.entries[:2], double)), pins=pins)


def test_no_roster_has_a_lower_threshold_more_colluders_or_two_members():
    for members, threshold in ((3, 3), (6, 5), (20, 14), (100, 67)):
        assert roster(members).threshold == threshold
    assert roster(20, colluding=6).honest == 8
    with pytest.raises(Refused, match="at most 6"):
        roster(20, colluding=7)
    with pytest.raises(Refused, match="has 2 members"):
        dataclasses.replace(roster(3), entries=roster(3).entries[:2])
    of = roster(3)
    others = roster(3, noise=1.0), roster(3, values=21), roster(3, ring_bits=64), roster(3, colluding=0, values=19)
    assert of.digest == roster(3).digest and of.digest not in {other.digest for other in others}


# Secrets

def test_a_threshold_of_shares_gives_the_secret_and_fewer_fit_any_secret():
    secret = bytes(range(31))
    shares = shamir.split(secret, 3, [1, 2, 3, 4, 5])
    for numbers in ((1, 2, 3), (5, 2, 4)):
        assert shamir.combine(shares, shamir.coefficients(numbers)) == secret
    other = bytes(31)
    # two shares and any other secret lie on one polynomial, so two shares rule no secret out
    factors = shamir.coefficients((1, 2, 3))
    third = (int.from_bytes(other) - factors[1] * int.from_bytes(shares[1]) - factors[2] * int.from_bytes(shares[2])
             ) * pow(factors[3], -1, shamir.PRIME) % shamir.PRIME
    assert shamir.combine({1: shares[1], 2: shares[2], 3: third.to_bytes(32)}, factors) == other


def test_shares_that_do_not_fit_are_told_and_wrong_arguments_are_refused():
    shares = shamir.split(bytes(31), 2, [1, 2])
    with pytest.raises(ValueError, match="do not fit together"):
        shamir.combine(shares | {2: b"\x7f" * 32}, shamir.coefficients([1, 2]))
    for arguments, words in (((bytes(32), 2, [1, 2]), "must have 31"), ((bytes(31), 3, [1, 2]), "threshold is 3"),
                             ((bytes(31), 2, [1, 1]), "different"), ((bytes(31), 2, [0, 1]), "positive")):
        with pytest.raises(ValueError, match=words):
            shamir.split(*arguments)


def test_with_the_same_random_bytes_a_member_makes_the_same_package_and_upload():
    of = roster(3)
    offers = [attendance(of, "site-000", random=seeded(0)).offer() for _ in range(2)]
    assert offers[0].sealed == offers[1].sealed and offers[0].keys.mask_key == offers[1].keys.mask_key
    assert mask(own_mask_key(bytes(31)), 3, of.grid.dtype).tolist() == mask(own_mask_key(bytes(31)), 3,
                                                                            of.grid.dtype).tolist()


# Integers and noise

@pytest.mark.parametrize("values, members", [(1_000, 3), (1_000_000, 6), (1_000_000, 200)])
def test_a_grid_holds_every_sum_and_costs_a_hundredth_at_most(values, members):
    grid = Grid.fitting(values, clip_norm=3.0, expected_batch=256, members=members, noise=0.6)
    assert grid.sensitivity(values, 3.0) * grid.step <= 3.0 * 1.01
    longest = grid.most + math.ceil(MOST_DEVIATIONS * 0.6 * 2**grid.fraction_bits) + 1
    for way in (1, -1):
        total = sum((grid.wrapped(np.array([way * longest])) for _ in range(members)), np.zeros(1, grid.dtype))
        np.testing.assert_allclose(grid.decode(total), way * members * longest * grid.step)
    assert grid.ring_bits == (64 if members == 200 else 32)


@pytest.mark.parametrize("noise", [1e20, 1e305])
def test_noise_that_no_ring_can_hold_is_refused_however_large_a_member_says_it_is(noise):
    with pytest.raises(ValueError, match="can exceed 64 bits"):
        Grid.fitting(1_000, clip_norm=3.0, expected_batch=256, members=3, noise=noise)


def test_values_are_rounded_to_the_grid_and_what_is_too_long_is_cut():
    grid = Grid(clip_norm=1.0, fraction_bits=4, ring_bits=32, most=160)
    np.testing.assert_array_equal(grid.encode(np.array([0.0, 0.49 / 16, 0.51 / 16, -1.0, 99.0])), [0, 0, 1, -16, 160])
    with pytest.raises(ValueError, match="not finite"):
        grid.encode(np.array([math.nan]))


def test_rounded_noise_has_the_mean_and_variance_of_its_gaussian_and_a_twelfth():
    drawn = rounded_noise(RandomStream(digest("a test")), 3.0, 200_000)
    assert drawn.dtype == np.int64 and np.abs(drawn).max() <= 3 * MOST_DEVIATIONS + 1
    edges = np.arange(-6, 7)
    mass = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges + 0.5, [np.inf]]) / 3))
    counts = np.bincount(np.clip(drawn + 6, 0, 13), minlength=14)[:14]
    assert 1e-6 < stats.chisquare(counts, mass * len(drawn)).pvalue < 1 - 1e-6
    assert abs(drawn.var() - (9 + 1 / 12)) < 6 * math.sqrt(2 / len(drawn)) * 9


@pytest.mark.parametrize("clients", [2, 5, 14, 67])
def test_the_distance_falls_with_the_fourth_power_of_the_deviation(clients):
    """That is what the bound for finer grids rests on: distance × deviation⁴ tends to a limit that is close at 16."""
    scaled = [rounding_distance(deviation, clients) * deviation**4 for deviation in (2.0, 4.0, 8.0, 16.0)]
    first, second, last = (later / earlier - 1 for earlier, later in pairwise(scaled))
    assert abs(last) < abs(second) / 3 < abs(first) / 3 and abs(last) < 0.05, scaled
    assert rounding_distance(32.0, clients) == pytest.approx(rounding_distance(16.0, clients) / 16)


def test_one_clients_rounding_is_free_and_on_the_products_grids_a_cohorts_is_as_good_as_free():
    assert rounding_distance(5.0, 1) < 1e-12
    grid = Grid.fitting(10_000, clip_norm=1.0, expected_batch=256, members=6, noise=0.6)
    added = rounding_delta(0.6 * 2**grid.fraction_bits, 5, coordinates=10_000 * 160, epsilon=8.0)
    assert added < 0.01 * 1e-5
    with pytest.raises(ValueError, match="finer grid"):
        rounding_distance(0.5, 3)
