"""Secure sums at the client: what it sends opens the plain sum, and whoever breaks the protocol gets nothing."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest

from fedlora import wire
from fedlora.plan import AGGREGATE, Refused
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.packages import Closing, CohortRequest, sent_digest, survivors_statement
from fedlora.secure_sum.statements import sign
from fedlora.wire import WireError, pb
from fedlora.wire.sums import reveal_from_wire, roster_to_wire
from fedlora_client.connection import Goodbye
from fedlora_server.pki.authority import Authority
from tests.client.sum_server import (
    SENT,
    STATE,
    Site,
    SumServer,
    secure_plan,
    terms_of,
)
from tests.federation import plan_of
from tests.fedlora.secure_sums import identity_of

NAMES = ("east", "north", "south", "west")
KEY, NEXT, LATER = pb.Key(round=1, attempt=0), pb.Key(round=1, attempt=1), pb.Key(round=2, attempt=0)


class Federation:
    """A server by hand and four real clients, of which a test can ask anything."""

    def __init__(self, plan=None, **north):
        self.server = SumServer(plan or secure_plan())
        self.sites = {name: Site(self.server.address, name, **(north if name == "north" else {})) for name in NAMES}
        self.entries = {}
        for name in NAMES:
            self.entries[name], _ = self.server.entry(name)
        self.roster = self.server.roster(self.entries.values())
        received = wire.rounded(STATE, self.server.plan.wire_dtype)
        self.sent = sent_digest(wire.tensors_digest(received), wire.tensors_digest({}))

    def packages(self, key=KEY, names=NAMES):
        """Give the roster, ask for key packages, and return the collector that holds them."""
        self.server.give_roster(self.roster, names)
        collector = Collector(self.roster, round=key.round, attempt=key.attempt)
        for name in names:
            collector.add_package(self.server.package(name, key))
        return collector

    def train(self, collector, key=KEY, names=NAMES):
        """Send the cohort to these clients, and take what they upload."""
        cohort = collector.form_cohort(self.sent)
        for name in names:
            self.server.order(name, key, cohort[name])
            collector.add_upload(name, self.server.upload(name))

    def agree(self, collector, key=KEY, names=()):
        survivors = collector.close()
        for name in names or survivors:
            collector.add_signature(name, self.server.agree(name, key, survivors).agreement.signature)

    def reveal(self, collector, key=KEY, names=()):
        closing = collector.closing()
        for name in names or closing.survivors:
            collector.add_reveal(reveal_from_wire(self.server.reveal(name, key, closing).reveal, name))

    def plain(self, names=NAMES):
        return np.sum([self.sites[name].vector for name in names], axis=0)


@pytest.fixture
def federation():
    made = []

    def make(*arguments, **options):
        made.append(Federation(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.server.close()
        for site in one.sites.values():
            site.end()


def refused(federation, caplog, name="north"):
    """Check that a client has ended because the protocol was broken, and return what its log says."""
    error = federation.sites[name].end()
    assert isinstance(error, Refused) and error.refusal.code == "policy"
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


def is_declined(answer, code="policy"):
    refusal = answer.declined.refusal
    return (refusal.code, refusal.detail) == (code, "")


@pytest.mark.parametrize("colluding", [0, 1])
def test_what_clients_send_opens_the_plain_sum_of_whose_uploads_came_and_their_owners_are_told(federation, colluding):
    run = federation(secure_plan(least_members=4, colluding=colluding))
    collector = run.packages()
    run.train(collector, names=NAMES[:3])
    run.agree(collector)
    run.reveal(collector)
    np.testing.assert_array_equal(collector.opened(), run.plain(NAMES[:3]))
    [who, opened] = run.sites["north"].told
    assert "4 members: east, north, south, west" in who and f"noise of {3 - colluding} honest members" in who
    assert "sum of 3 of 4 clients' uploads" in opened
    second = run.packages(LATER)
    run.train(second, LATER)
    assert len(run.sites["west"].told) == 1, "west masked nothing in the first round"
    run.server.close()
    assert isinstance(run.sites["north"].end(), Goodbye)
    run.sites["north"].member.close()
    assert "revealed no share" in run.sites["north"].told[-1] and len(run.sites["north"].told) == 3


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_a_sum_in_the_wide_ring_travels_as_64_bits_however_other_tensors_travel(federation, wire_dtype):
    run = federation(secure_plan(wire_dtype=wire_dtype))
    grid = dataclasses.replace(run.roster.grid, ring_bits=64)
    run.roster = dataclasses.replace(run.roster, grid=grid)
    collector = run.packages()
    run.train(collector)
    assert collector.held.total.dtype == np.uint64
    run.agree(collector)
    run.reveal(collector)
    np.testing.assert_array_equal(collector.opened(), run.plain())


def test_a_client_that_comes_back_on_another_stream_in_every_phase_gives_the_same_again(federation):
    run, again = federation(), []
    membership = run.sites["north"].member.membership()
    run.server.give_roster(run.roster)
    assert run.server.drop("north").membership == membership
    run.server.give_roster(run.roster, ["north"])
    collector = Collector(run.roster, round=1, attempt=0)
    for name in NAMES:
        collector.add_package(run.server.package(name, KEY))
    run.server.drop("north")
    collector.add_package(run.server.package("north", KEY))  # another package would be refused
    run.train(collector)
    run.server.drop("north")
    run.server.order("north", KEY, collector.form_cohort(SENT)["north"])
    again.append(run.server.upload("north"))
    np.testing.assert_array_equal(again[0], run.sites["north"].uploads[run.server.plan.run_id, 1, 0].tensors["sum"])
    for phase in (run.agree, run.reveal):
        phase(collector)
        run.server.drop("north")
        phase(collector, names=["north"])
    np.testing.assert_array_equal(collector.opened(), run.plain())
    assert len(run.sites["north"].told) == 2, "what is said again is told once"


def test_a_client_that_was_started_again_gives_no_secret_of_before_and_is_in_the_next_roster(federation):
    run = federation()
    collector = run.packages()
    run.train(collector)
    before = run.sites["north"]
    before.connection.leave()
    before.end()
    while run.server.hear("north").WhichOneof("kind") != "leave":
        pass
    run.sites["north"] = Site(run.server.address, "north", stored=before.uploads)
    entry, _ = run.server.entry("north")
    assert entry.certificate == run.entries["north"].certificate
    assert entry.sealing_key != run.entries["north"].sealing_key
    survivors = collector.close()
    assert is_declined(run.server.agree("north", KEY, survivors), "unavailable")
    run.agree(collector, names=("east", "south", "west"))
    assert is_declined(run.server.reveal("north", KEY, collector.closing()), "unavailable")
    run.server.order("north", KEY, collector.form_cohort(SENT)["north"])
    again = run.server.upload("north")
    np.testing.assert_array_equal(again, before.uploads[run.server.plan.run_id, 1, 0].tensors["sum"])
    assert is_declined(run.server.ask("north", pb.SumRequest(package=NEXT)), "unavailable"), "it has no roster"
    run.reveal(collector, names=("east", "south", "west"))
    np.testing.assert_array_equal(collector.opened(), run.plain())
    run.roster = run.server.roster([*(run.entries | {"north": entry}).values()])
    assert run.packages(LATER).form_cohort(SENT).keys() == set(NAMES)


def test_secrets_of_an_attempt_are_gone_once_a_later_one_begins(federation):
    run = federation()
    collector = run.packages()
    run.train(collector)
    survivors = collector.close()
    run.packages(NEXT, names=["north"])
    assert "revealed no share, and other members may have opened a sum" in run.sites["north"].told[-1]
    for answer in (run.server.agree("north", KEY, survivors), run.server.ask("north", pb.SumRequest(package=KEY)),
                   run.server.reveal("north", KEY, Closing(survivors, {name: b"x" for name in survivors}))):
        assert is_declined(answer, "unavailable")
    for phase in (run.agree, run.reveal):
        phase(collector, names=("east", "south", "west"))
    np.testing.assert_array_equal(collector.opened(), run.plain(), "the others' shares open a sum that holds north's")


def test_a_client_tells_its_noise_only_where_its_owner_allows_that(federation):
    plan = secure_plan(clip_norm=2.0)
    run = federation(plan, terms=terms_of(plan, 3.0, clip_norm=1.0))
    assert run.sites["north"].member.membership().noise == 1.5
    run = federation(announced=False)
    assert run.sites["north"].member.membership().noise == 0


def test_a_renewed_certificate_is_in_the_next_ready(federation):
    held = [identity_of("north")]
    run = federation(identity=lambda: held[-1])
    held.append(dataclasses.replace(held[0], chain_pem=held[0].chain_pem + held[0].authority_pem))
    ready = run.server.drop("north")
    assert ready.membership.certificate == held[-1].chain_pem
    assert ready.membership.sealing_key == run.entries["north"].sealing_key


# ---- Wrong rosters

def stranger(run):
    """Return a roster in which another authority's west is a member."""
    other = Authority.create(run.folder / "pki", ["127.0.0.1"])
    false = identity_of("west", other)
    entry = type(run.entries["west"]).signed("west", false.chain_pem, run.entries["west"].sealing_key, run.server.run,
                                             false.key)
    return run.server.roster([*(run.entries | {"west": entry}).values()])


def own_changed(run):
    """Return a roster in which this client's shares would be sealed for somebody else."""
    entry = dataclasses.replace(run.entries["north"], sealing_key=run.entries["west"].sealing_key)
    return run.server.roster([*(run.entries | {"north": entry}).values()])


def fewer(run, *names):
    return run.server.roster([run.entries[name] for name in names])


ROSTERS = {
    "does not come from the authority": stranger,
    "as this site sent it": own_changed,
    "it must have 4 or more": lambda run: fewer(run, *NAMES[:3]),
    "1 may collude; by the plan": lambda run: run.server.roster(run.entries.values(), colluding=1),
    "this one adds": lambda run: run.server.roster(run.entries.values(), noise=3.0),
    "the roster's grid is": lambda run: dataclasses.replace(run.roster, grid=dataclasses.replace(
        run.roster.grid, fraction_bits=run.roster.grid.fraction_bits - 1)),
    "for 50 values of this plan": lambda run: dataclasses.replace(run.roster, grid=dataclasses.replace(
        run.roster.grid, clip_norm=0.5)),
    "is not signed by its certificate's key": lambda run: run.server.roster(
        [*(run.entries | {"west": dataclasses.replace(run.entries["west"], signature=b"x" * 70)}).values()]),
}


@pytest.mark.parametrize("said", ROSTERS)
def test_a_roster_that_breaks_a_rule_ends_the_clients_part_with_a_bare_code_and_the_reason_in_its_log(
        federation, caplog, tmp_path, said):
    run = federation(secure_plan(least_members=4))
    run.folder = tmp_path
    answer = run.server.ask("north", pb.SumRequest(roster=roster_to_wire(ROSTERS[said](run))))
    assert is_declined(answer)
    assert said in refused(run, caplog)
    assert run.sites["north"].told == []


def test_a_member_that_the_owner_did_not_name_is_refused_with_its_fingerprint(federation, caplog):
    pins = [identity_of(name).certificate.fingerprint for name in NAMES]
    run = federation(pins=pins[:3])
    assert is_declined(run.server.ask("north", pb.SumRequest(roster=roster_to_wire(run.roster))))
    assert f"its fingerprint is {pins[3]}" in refused(run, caplog)
    run = federation(pins=pins)
    run.server.give_roster(run.roster, ["north"])
    assert "does not name" not in run.sites["north"].told[0]


def test_a_roster_below_the_owners_least_number_is_refused(federation, caplog):
    run = federation(least=5)
    assert is_declined(run.server.ask("north", pb.SumRequest(roster=roster_to_wire(run.roster))))
    assert "this site's policy takes part with 5" in refused(run, caplog)


def test_a_roster_whose_sums_promise_less_noise_than_is_charged_is_refused(federation, caplog):
    terms = dataclasses.replace(terms_of(secure_plan()), mechanism=AGGREGATE, aggregate_noise_multiplier=3.5,
                                least_members=4)
    pins = [identity_of(name).certificate.fingerprint for name in NAMES]
    run = federation(terms=terms, pins=pins)
    assert is_declined(run.server.ask("north", pb.SumRequest(roster=roster_to_wire(run.roster))))
    assert "the run is charged for the noise of its sums" in refused(run, caplog)


def test_what_the_ledger_keeps_of_a_roster_is_noted_once_a_cohort_is_accepted_and_not_before(federation):
    noted = []
    run = federation(note=noted.append)
    collector = run.packages()
    assert not noted
    run.train(collector, names=["north"])
    run.train(run.packages(NEXT), NEXT, names=["north"])
    [facts] = noted
    assert (facts.digest, facts.members, facts.honest, facts.pinned) == (run.roster.digest.hex(), 4, 3, False)


def test_an_overflow_by_noise_that_the_server_does_not_know_is_foreseen(federation, caplog):
    plan = secure_plan()
    run = federation(plan, terms=terms_of(plan, 1e5), announced=False)
    assert run.roster.grid.ring_bits == 32
    assert is_declined(run.server.ask("north", pb.SumRequest(roster=roster_to_wire(run.roster))))
    assert "overflow can be foreseen" in refused(run, caplog)


def test_after_a_breach_nothing_more_is_answered(federation):
    run = federation()
    member = run.sites["north"].member
    wrong = pb.SumRequest(roster=roster_to_wire(run.server.roster(run.entries.values(), noise=3.0)))
    for request in (wrong, pb.SumRequest(roster=roster_to_wire(run.roster)), pb.SumRequest(package=KEY)):
        assert is_declined(member.answer(request))


# ---- Wrong cohorts

def small(run, collector):
    """Return a cohort below the threshold."""
    return {"cohort": run.cohort.cohort[:2]}


def with_an_old_package(run, collector):
    """Return a cohort in which west's package is that of the attempt before."""
    return {"cohort": (*run.cohort.cohort[:3], run.before.cohort[3]),
            "sealed": {**run.cohort.sealed, "west": run.before.sealed["west"]}}


def with_a_stranger(run, collector):
    false = dataclasses.replace(run.cohort.cohort[3], name="zoe")
    return {"cohort": (*run.cohort.cohort[:3], false)}


def with_another_own(run, collector):
    keys = {keys.name: keys for keys in run.cohort.cohort}
    return {"cohort": (keys["east"], dataclasses.replace(keys["north"], mask_key=keys["west"].mask_key),
                       keys["south"], keys["west"])}


COHORTS = {
    "must have 3 at least": small,
    "'west' was not made for attempt 1 at round 1": with_an_old_package,
    "'zoe' is not a member": with_a_stranger,
    "does not hold the key package that 'north' gave": with_another_own,
    "are not those that its cohort starts from": lambda run, collector: {"sent": b"other tensors"},
    "cannot be opened": lambda run, collector: {"sealed": {**run.cohort.sealed, "west": run.cohort.sealed["east"]}},
}


@pytest.mark.parametrize("said", COHORTS)
def test_a_cohort_that_breaks_a_rule_gets_a_refusal_and_no_vector(federation, said):
    run = federation()
    run.before = run.packages().form_cohort(SENT)["north"]
    collector = run.packages(NEXT)
    run.cohort = collector.form_cohort(SENT)["north"]
    run.server.order("north", NEXT, dataclasses.replace(run.cohort, **COHORTS[said](run, collector)))
    assert run.server.upload("north") == pb.Refusal(code="policy")
    assert said in run.sites["north"].refused[0] and not run.sites["north"].uploads


def test_a_second_cohort_for_one_attempt_ends_the_clients_part(federation, caplog):
    run = federation()
    collector = run.packages()
    run.train(collector, names=["north"])
    cohort = collector.form_cohort(SENT)["north"]
    run.server.order("north", KEY, dataclasses.replace(cohort, cohort=cohort.cohort[:3]))
    assert "was given a second cohort" in refused(run, caplog)


def test_an_attempt_that_was_given_a_cohort_does_not_begin_anew_with_another_roster(federation, caplog):
    run = federation()
    collector = run.packages()
    run.train(collector, names=["north"])
    run.roster = fewer(run, *NAMES[:3])
    run.server.give_roster(run.roster, ["north"])
    assert is_declined(run.server.ask("north", pb.SumRequest(package=KEY)))
    assert "needs a number of its own" in refused(run, caplog)


def test_an_attempt_without_a_cohort_begins_anew_with_another_roster(federation):
    run = federation()
    run.packages()
    run.roster = fewer(run, *NAMES[:3])
    collector = run.packages(names=NAMES[:3])
    run.train(collector, names=NAMES[:3])
    run.agree(collector)
    run.reveal(collector)
    np.testing.assert_array_equal(collector.opened(), run.plain(NAMES[:3]))


# ---- Wrong survivors and closings

def signed_twice(run, collector):
    run.agree(collector)
    return run.server.agree("north", KEY, NAMES[:3])


def closed_without_agreement(run, collector):
    return run.server.reveal("north", KEY, Closing(NAMES, {name: b"x" for name in NAMES}))


def closed_with_forged_signatures(run, collector):
    run.agree(collector)
    cohort = collector.form_cohort(SENT)["north"]
    forged = sign(identity_of("north").key, survivors_statement(collector.attempt, cohort.digest, NAMES))
    return run.server.reveal("north", KEY, Closing(NAMES, dict.fromkeys(NAMES, forged)))


SURVIVORS = {
    "closed already with other clients": signed_twice,
    "that it is not part of": lambda run, collector: run.server.agree("north", KEY, ["east", "south", "west"]),
    "must have 3 at least": lambda run, collector: run.server.agree("north", KEY, NAMES[:2]),
    "one is not of the cohort": lambda run, collector: run.server.agree("north", KEY, [*NAMES, "zoe"]),
    "did not agree to this set": closed_without_agreement,
    "and 3 must": closed_with_forged_signatures,
}


@pytest.mark.parametrize("said", SURVIVORS)
def test_survivors_that_break_a_rule_get_no_signature_and_no_share(federation, caplog, said):
    run = federation()
    collector = run.packages()
    run.train(collector)
    assert is_declined(SURVIVORS[said](run, collector))
    assert said in refused(run, caplog)
    assert not any("revealed its shares" in line for line in run.sites["north"].told)


def test_survivors_are_not_signed_before_the_upload_is_made(federation, caplog):
    run = federation()
    run.packages()
    assert is_declined(run.server.agree("north", KEY, NAMES))
    assert "no cohort was accepted" in refused(run, caplog)


# ---- Frames in the wrong place

@pytest.mark.parametrize("wrong", ["a SumRequest", "a cohort"])
def test_in_a_run_without_secure_aggregation_its_frames_break_the_protocol(wrong):
    server = SumServer(plan_of("ffa-lora", private=True))
    site = Site(server.address, "north")
    server.ready("north")
    if wrong == "a cohort":
        server.order("north", KEY, CohortRequest((), {}, b"x"))
    else:
        server.request("north", pb.SumRequest(package=KEY))
    assert isinstance(site.end(), WireError)
    server.close()


def test_an_order_without_a_cohort_breaks_the_protocol_of_secure_aggregation(federation):
    run = federation()
    run.server.order("north", KEY, None)
    error = run.sites["north"].end()
    assert isinstance(error, WireError) and "cohort" in str(error)


@pytest.mark.parametrize("request_", [pb.SumRequest(), pb.SumRequest(package=pb.Key()), pb.SumRequest(
    survivors=pb.Survivors(key=KEY, names=["\x1b[2J"])), pb.SumRequest(roster=pb.Roster())], ids=range(4))
def test_a_request_that_is_no_valid_message_ends_the_connection(federation, request_):
    run = federation()
    run.server.request("north", request_)
    assert isinstance(run.sites["north"].end(), WireError)
