"""A server that breaks the protocol of secure sums gets nothing from a real client process, over mutual TLS.

The other members are honest, and their messages are made in this process.
"""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

import fedlora
from fedlora import models, wire
from fedlora.adapters import attach_planned, initial_tensors
from fedlora.identity.folder import read_identity
from fedlora.plan import AGGREGATE, RunPlan
from fedlora.privacy import Ledger
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.packages import Closing, sent_digest
from fedlora.secure_sum.roster import Entry, run_digest
from fedlora.wire import pb
from fedlora.wire.sums import reveal_from_wire, roster_to_wire
from fedlora_client.verify_command import main
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls
from tests.client.sum_server import SumServer, roster_of
from tests.identities import enrolled
from tests.processes import Deployment, write_rows

NORTH, OTHERS = "north", ("east", "south", "west")
KEY, NEXT = pb.Key(round=1, attempt=0), pb.Key(round=1, attempt=1)


class Hostile:
    """A server by hand with a real client process called north, and three honest members beside it."""

    def __init__(self, folder, checkpoint):
        self.folder, self.authority = folder, Authority.create(folder / "pki", ["127.0.0.1"])
        self.plan = RunPlan(
            run_id="ab" * 8, fedlora_version=fedlora.__version__, strategy="ffa-lora", family="frozen-a", private=True,
            model=models.reference("local", checkpoint), task="classification", labels=("routine", "urgent"),
            max_length=16, rank=2, alpha=2.0, targets=("query",), train_head=True, dropout=0.0, rounds=2,
            max_participations=4, local_steps=1, expected_batch=8, optimizer="sgd", lr=0.1, clip_norm=0.5,
            adapter_scale=1.0, head_scale=1.0, weight_by_examples=False, mechanism=AGGREGATE, least_members=4)
        adapted = attach_planned(models.load(checkpoint, self.plan.task, 2), self.plan)
        self.state = initial_tensors(adapted, init="orthonormal", seed=0)
        self.values = adapted.layout.num_trained
        frozen = {spec.name for spec in adapted.layout.frozen}
        digests = [wire.tensors_digest({name: array for name, array in self.state.items() if (name in frozen) == kept})
                   for kept in (False, True)]
        self.frozen_sha256, self.sent = digests[1], sent_digest(*digests)
        self.server = SumServer(self.plan, ServerTls(self.authority.folder).credentials())
        self.deployment = Deployment(folder, checkpoint)
        self.deployment.address = self.server.address
        self.data = write_rows(folder / "data" / "north.jsonl", seed=0)
        self.identities = {name: read_identity(enrolled(self.authority, folder / "tls" / name, name))
                           for name in (NORTH, *OTHERS, "zoe")}
        self.sealing = {name: X25519PrivateKey.generate() for name in (*OTHERS, "zoe")}
        self.others, self.uploaded = {}, None

    def client(self, policy=""):
        """Start north, and return its entry in rosters."""
        path = self.folder / "policy.toml"
        if not path.exists():  # the first run writes the data's budget into it
            path.write_text(policy)
        self.deployment.client(NORTH, self.data, "--tls", self.folder / "tls" / NORTH, "--policy", path,
                               "--epsilon", 200)
        return self.server.entry(NORTH)[0]

    def entry(self, name):
        identity = self.identities[name]
        return Entry.signed(name, identity.chain_pem, public_bytes(self.sealing[name]), run_digest(self.plan),
                            identity.key)

    def roster(self, *entries):
        """Return the roster of these and of the honest members, of little noise."""
        return roster_of(self.plan, [*entries, *map(self.entry, OTHERS)], noise=0.01, values=self.values)

    def packages(self, roster, key):
        """Have all give their key packages, and return the collector that holds them."""
        self.server.give_roster(roster, [NORTH])
        collector = Collector(roster, round=key.round, attempt=key.attempt)
        collector.add_package(self.server.package(NORTH, key))
        for name in OTHERS:
            self.others[name] = Attendance(name, roster, self.identities[name].key, self.sealing[name], round=key.round,
                                           attempt=key.attempt)
            collector.add_package(self.others[name].offer())
        return collector

    def order(self, key, cohort):
        """Order north to train, and return its vector or its refusal."""
        self.server.order(NORTH, key, cohort, self.state, self.frozen_sha256)
        return self.server.upload(NORTH)

    def trained(self):
        """Return a collector whose cohort has uploaded, all but north to a vector of zeros."""
        collector = self.packages(self.roster(self.client()), KEY)
        cohort = collector.form_cohort(self.sent)
        self.uploaded = self.order(KEY, cohort[NORTH])
        collector.add_upload(NORTH, self.uploaded)
        for name in OTHERS:
            self.others[name].accept(cohort[name], self.sent)
            collector.add_upload(name, self.others[name].masked(np.zeros(self.values, np.int64)))
        return collector

    def ended(self, said, *, charged):
        """Check that north has ended for this reason, after so many charges and without a share of its own."""
        assert self.deployment.end(NORTH, 60) == 4, self.deployment.log(NORTH)
        log = self.deployment.log(NORTH)
        assert said in log and "Traceback" not in log and "revealed its shares" not in log, log
        assert len(self.charges()) == charged

    def charges(self):
        ledger = Ledger(self.deployment.home(NORTH) / "state" / "fedlora" / "ledger.sqlite")
        try:
            return ledger.charges()
        finally:
            ledger.close()


@pytest.fixture
def run(tmp_path, checkpoint):
    hostile = Hostile(tmp_path, checkpoint("bert"))
    yield hostile
    hostile.deployment.__exit__()
    hostile.server.close()


def is_declined(answer):
    return (answer.declined.refusal.code, answer.declined.refusal.detail) == ("policy", "")


def test_a_client_s_report_says_of_which_sums_it_revealed_its_shares(run):
    collector = run.trained()
    survivors = collector.close()
    for name in OTHERS:
        collector.add_signature(name, run.others[name].agree(survivors))
    collector.add_signature(NORTH, run.server.agree(NORTH, KEY, survivors).agreement.signature)
    for _ in range(2):  # it is asked again where the answer was lost
        collector.add_reveal(reveal_from_wire(run.server.reveal(NORTH, KEY, collector.closing()).reveal, NORTH))
    for name in OTHERS:
        collector.add_reveal(run.others[name].reveal(collector.closing()))
    assert collector.opened().any(), "the sum is that of north alone, as the others sent zeros"
    second = run.packages(collector.roster, NEXT)
    assert isinstance(run.order(NEXT, second.form_cohort(run.sent)[NORTH]), np.ndarray)
    run.server.close()
    assert run.deployment.end(NORTH, 60) == 0, run.deployment.log(NORTH)
    folder = run.folder / "state" / NORTH / run.plan.run_id
    report = json.loads((folder / "privacy.json").read_text())
    assert report["sums"]["revealed"] == [{"round": 1, "attempt": 0}] and len(report["trainings"]) == 2
    assert "revealed its shares of 1, so" in (folder / "privacy.md").read_text()
    assert main([str(folder / "privacy.json"), "--any-key"]) == 0


def test_a_member_that_the_server_invents_is_found_by_the_pins_before_anything_is_charged(run):
    pins = [run.identities[name].certificate.fingerprint for name in OTHERS]
    entry = run.client(f"trust = \"aggregate\"\nmembers = {json.dumps(pins)}\nleast-members = 4\n")
    assert is_declined(run.server.ask(NORTH, pb.SumRequest(roster=roster_to_wire(
        run.roster(entry, run.entry("zoe"))))))
    run.ended("'zoe' is in the roster and is none of the members", charged=0)


COHORTS = {
    "'west' was not made for attempt 1 at round 1": lambda now, before: {
        "cohort": (*now.cohort[:3], before.cohort[3]), "sealed": now.sealed | {"west": before.sealed["west"]}},
    "the cohort has 2 clients": lambda now, before: {"cohort": now.cohort[:2]},
    "are not those that its cohort starts from": lambda now, before: {"sent": b"what others got"}}


@pytest.mark.parametrize("said", COHORTS, ids=["a replayed package", "a lowered threshold", "other tensors"])
def test_a_wrong_cohort_is_refused_before_anything_is_charged(run, said):
    roster = run.roster(run.client())
    before = run.packages(roster, KEY).form_cohort(run.sent)[NORTH]
    now = run.packages(roster, NEXT).form_cohort(run.sent)[NORTH]
    refusal = run.order(NEXT, dataclasses.replace(now, **COHORTS[said](now, before)))
    assert refusal == pb.Refusal(code="policy")
    run.ended(said, charged=0)


def test_signatures_of_members_who_were_shown_another_cohort_open_nothing(run):
    collector = run.packages(run.roster(run.client()), KEY)
    assert isinstance(run.order(KEY, collector.form_cohort(run.sent)[NORTH]), np.ndarray)
    names, signatures = (NORTH, *OTHERS), {}
    for name in OTHERS:
        shown = dataclasses.replace(collector.form_cohort(run.sent)[name], sent=b"another start")
        run.others[name].accept(shown, b"another start")
        run.others[name].masked(np.zeros(run.values, np.int64))
        signatures[name] = run.others[name].agree(tuple(sorted(names)))
    answer = run.server.agree(NORTH, KEY, sorted(names))
    signatures[NORTH] = answer.agreement.signature
    assert is_declined(run.server.reveal(NORTH, KEY, Closing(tuple(sorted(names)), signatures)))
    run.ended("1 clients signed whose uploads are in the sum", charged=1)


def ask_with_a_second_cohort(run, collector, names):
    cohort = collector.form_cohort(run.sent)[NORTH]
    run.server.order(NORTH, KEY, dataclasses.replace(cohort, cohort=cohort.cohort[:3], sealed={
        name: cohort.sealed[name] for name in ("east", "south")}), run.state, run.frozen_sha256)


def ask_for_a_second_set(run, collector, names):
    assert run.server.agree(NORTH, KEY, names).agreement.signature
    assert is_declined(run.server.agree(NORTH, KEY, names[:3]))


def ask_for_too_small_a_set(run, collector, names):
    assert is_declined(run.server.agree(NORTH, KEY, names[:2]))


def ask_with_too_few_signatures(run, collector, names):
    own = run.server.agree(NORTH, KEY, names).agreement.signature
    signatures = {NORTH: own, "east": run.others["east"].agree(names)}
    assert is_declined(run.server.reveal(NORTH, KEY, Closing(names, signatures)))


@pytest.mark.parametrize(("ask", "said"), [
    (ask_with_a_second_cohort, "was given a second cohort"),
    (ask_for_a_second_set, "was closed already with other clients"),
    (ask_for_too_small_a_set, "2 clients' uploads are in the sum"),
    (ask_with_too_few_signatures, "2 clients signed whose uploads are in the sum")])
def test_a_server_that_asks_twice_or_with_too_few_gets_no_share(run, ask, said):
    collector = run.trained()
    ask(run, collector, collector.close())
    run.ended(said, charged=1)


def test_a_stored_upload_that_is_asked_for_in_another_cohort_is_not_unmasked(run):
    run.trained()
    run.deployment.processes[NORTH].send_signal(signal.SIGKILL)
    run.deployment.end(NORTH)
    again = run.packages(run.roster(run.client()), KEY)
    np.testing.assert_array_equal(run.order(KEY, again.form_cohort(run.sent)[NORTH]), run.uploaded)
    assert is_declined(run.server.agree(NORTH, KEY, sorted((NORTH, *OTHERS))))
    run.ended("no cohort was accepted", charged=1)
