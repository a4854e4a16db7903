"""Secure sums over real connections: what is opened, who may be missing, and what a killed server goes on with."""

import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from fedlora.plan import AGGREGATE, Proposal
from fedlora.plan.limits import sum_threshold
from fedlora_server import sum_roster
from fedlora_server.client_sampling import Clients, Ended
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.round_state import RoundOptions
from fedlora_server.sum_roster import Rosters
from fedlora_server.sum_round import PHASES, TRAINING, SumRound
from fedlora_server.tls import ServerTls
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import to_record
from tests.covering import WHOLE
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.ledgers import no_file_left
from tests.fedlora.secure_sums import authority, identity_of
from tests.sum_clients import (
    AGREEMENT,
    NAMES,
    PACKAGE,
    REVEAL,
    STEPS,
    UPLOAD,
    SumClient,
    expected,
    leave,
    started,
)


def secure_plan(least=3, colluding=0, **changes):
    return plan_of("ffa-lora", private=True, mechanism=AGGREGATE, least_members=least, colluding=colluding,
                   local_steps=1, max_participations=9, **changes)


class Heard(Observer):
    """An observer that keeps what it hears of secure sums."""

    def __init__(self):
        self.phases, self.why, self.made, self.out = [], [], [], {}

    def summing(self, round, phase):
        self.phases.append(phase)

    def unopened(self, round, attempt, why):
        self.why.append(why)

    def rostered(self, round, names, threshold, digest):
        self.made.append(names)

    def left_out(self, name, why):
        self.out[name] = why


class Federation:
    """A real server engine and what a round needs, without the round loop."""

    def __init__(self, folder, plan, **options):
        self.plan, self.layout = plan, layout_of(plan.family)
        self.engine = GrpcEngine("127.0.0.1:0", Proposal(plan), folder, tls=ServerTls(authority().folder))
        self.engine.expect(self.layout)
        self.strategy = strategy_class(plan.strategy)(plan, self.layout)
        self.options = RoundOptions(**{"seed": 0, "min_clients": plan.least_members, "wait_timeout_s": 2.0} | options)
        self.clients, self.heard, self.stop = Clients(self.engine, plan, 0), Heard(), threading.Event()
        self.rosters = Rosters(self.engine, self.clients, plan, self.layout.num_trained, self.options, self.heard,
                               self.stop, lambda write: None, renewed=self.strategy.forget)

    def await_ready(self, count):
        while len(self.engine.get_node_ids()) < count:
            self.engine.wait((), 0.05)

    def round(self, number=1):
        return SumRound(self.engine, self.strategy, self.clients, self.rosters, number, self.options, self.heard,
                        self.stop)

    def opened(self, number=1):
        """Hold a round, check that its sum is that of the survivors' vectors, and return it and the survivors."""
        under_way = self.round(number)
        opened = under_way.collect(to_record(start_of(self.layout, 1)))
        key = self.plan.run_id, number, under_way.attempts - 1
        assert np.array_equal(opened.total, expected(key, opened.survivors, self.layout.num_trained))
        return under_way, opened.survivors


@contextmanager
def federation(folder, count, drops=None, plan=None, **options):
    plan = plan or secure_plan(min(count, 3))
    there = Federation(folder, plan, **options)
    clients = started(there.engine.address, count, plan, drops)
    try:
        there.await_ready(count)
        yield there, clients
    finally:
        leave(clients.values())
        there.engine.close("the test is over")


@pytest.mark.parametrize("count", [3, 6])
def test_the_opened_sum_is_the_plain_sum_of_the_vectors(count, tmp_path):
    with federation(tmp_path, count) as (there, clients):
        for number in (1, 2):
            under_way, survivors = there.opened(number)
            assert survivors == NAMES[:count] == under_way.cohort
        assert [len(client.rosters) for client in clients.values()] == [1] * count, "one roster serves both rounds"


@pytest.mark.parametrize("step", [PACKAGE, UPLOAD, AGREEMENT, REVEAL])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_sum_of_six_is_opened_unless_more_than_one_drop_out(step, gone, tmp_path):
    drops = {name: [(step, 1, 0)] for name in NAMES[:gone]}
    with federation(tmp_path, 6, drops) as (there, clients):
        under_way, survivors = there.opened()
        left_before = gone if step in (PACKAGE, UPLOAD) else 0
        if gone < 2:
            assert under_way.unopened == 0 and survivors == NAMES[left_before:6]
        elif step == PACKAGE:  # nobody was asked to train for a sum that cannot be opened
            assert under_way.unopened == 0 and under_way.attempts == 1 and survivors == NAMES[2:6]
        else:  # charged and not opened; the four that are left make another roster, of which three open a sum
            assert under_way.unopened == 1 and survivors == NAMES[2:6]
            assert [len(clients[name].trained) for name in survivors] == [2] * 4
            assert len(there.heard.why) == 1 and there.heard.made[-1] == NAMES[2:6]


@pytest.mark.parametrize("step", [UPLOAD, REVEAL])
def test_a_run_whose_clients_are_too_few_for_another_attempt_ends_with_the_reason(step, tmp_path):
    with federation(tmp_path, 3, {"site-001": [(step, 1, 0)]}) as (there, clients):
        with pytest.raises(Ended, match="wait-timeout") as ended:
            there.opened()
        assert "2 of the 3 clients that a sum needs are ready" in ended.value.why
        assert ("2 clients revealed their shares, and 3 must" in ended.value.why) == (step == REVEAL)
        assert clients["site-000"].trained == [(there.plan.run_id, 1, 0)]


def test_a_run_whose_attempts_have_used_up_what_clients_train_ends_with_the_reason(tmp_path):
    plan = replace(secure_plan(), max_participations=1)
    with federation(tmp_path, 3, plan=plan) as (there, _):
        there.opened(1)
        with pytest.raises(Ended, match="wait-timeout") as ended:
            there.opened(2)
        assert "trained 1 times and may not again" in ended.value.why
        assert "--max-participations" in ended.value.why


def test_a_client_that_joins_late_waits_for_the_next_roster(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        assert there.opened(1)[1] == NAMES[:3]
        clients["site-003"] = SumClient(there.engine.address, "site-003", there.plan).start()
        there.await_ready(4)
        assert there.opened(2)[1] == NAMES[:4]
        assert [len(client.rosters) for client in clients.values()] == [2, 2, 2, 1]


def test_a_client_that_comes_after_the_packages_is_not_in_the_sum_of_that_attempt(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        class Late(Heard):
            def summing(self, round, phase):
                if (round, phase) == (1, TRAINING):
                    clients["site-003"] = SumClient(there.engine.address, "site-003", there.plan).start()
                    there.await_ready(4)

        there.heard = Late()
        assert there.opened(1)[1] == NAMES[:3] and clients["site-003"].rosters == []
        assert there.opened(2)[1] == NAMES[:4]


def test_a_client_that_is_started_again_is_in_a_new_roster(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        there.opened(1)
        clients["site-001"].leave()
        clients["site-001"] = SumClient(there.engine.address, "site-001", there.plan).start()
        there.await_ready(3)
        assert there.opened(2)[1] == NAMES[:3]
        first, second = clients["site-000"].rosters
        assert first.members["site-001"] != second.members["site-001"] == clients["site-001"].entry
        assert clients["site-001"].frozen.keys() == {spec.name for spec in there.layout.frozen}, "it held none"
        assert clients["site-000"].received[1].isdisjoint(clients["site-001"].frozen), "it held them since round 1"


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_a_run_that_is_stopped_in_any_phase_ends_at_once(phase, tmp_path):
    with federation(tmp_path, 3, round_timeout_s=100.0, wait_timeout_s=100.0) as (there, clients):
        class Stopping(Heard):
            def summing(self, round, phase_):
                if phase_ == phase:
                    there.stop.set()

        clients["site-002"].silent = {(step, 1, 0) for step in STEPS[PHASES.index(phase):]}
        there.heard = Stopping()
        with pytest.raises(Ended, match="stopped"):
            there.opened()


def test_a_client_that_is_started_again_while_a_roster_is_made_is_not_told_that_of_its_former_process(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        class Restarting(Heard):
            def rostered(self, round, names, threshold, digest):
                if not self.made:
                    clients["site-002"].leave()
                    clients["site-002"] = again = SumClient(there.engine.address, "site-002", there.plan).start()
                    while again.entry not in [entry for entry, _ in there.engine.memberships().values()]:
                        there.engine.wait((), 0.05)
                self.made.append(names)

        there.heard = there.rosters._observer = Restarting()
        assert there.opened()[1] == NAMES[:3] and len(there.heard.made) == 2
        again = clients["site-002"]
        assert [roster.members["site-002"] for roster in again.rosters] == [again.entry]


def test_members_go_on_where_those_ready_are_too_few_for_the_roster_of_one_that_was_started_again(tmp_path):
    with federation(tmp_path, 9, plan=secure_plan(9)) as (there, clients):
        assert there.opened(1)[1] == NAMES[:9]
        clients["site-000"].leave()
        clients["site-001"].leave()
        clients["site-001"] = SumClient(there.engine.address, "site-001", there.plan).start()
        there.await_ready(8)
        assert there.opened(2)[1] == NAMES[2:9] and len(there.heard.made) == 1
        clients["site-000"] = SumClient(there.engine.address, "site-000", there.plan).start()
        there.await_ready(9)
        assert there.opened(3)[1] == NAMES[:9] and len(there.heard.made) == 2


def test_a_client_with_the_key_of_another_is_left_out_of_the_roster(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        own = identity_of("site-000")
        issued = authority().admit("twin", own.key.public_key())
        twin = replace(own, certificate=issued, chain_pem=issued.pem)
        clients["twin"] = SumClient(there.engine.address, "twin", there.plan, identity=twin).start()
        there.await_ready(4)
        assert there.opened()[1] == NAMES[:3] and "its key is that of site-000" in there.heard.out["twin"]


def test_a_client_whose_connection_breaks_is_asked_again(tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        class Breaking(Heard):
            def summing(self, round, phase):
                if phase not in self.phases:  # once in each phase
                    self.phases.append(phase)
                    clients["site-002"].lose_connection()

        there.heard = Breaking()
        assert there.opened()[1] == NAMES[:3]
        assert clients["site-002"].trained == [(there.plan.run_id, 1, 0)]


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_stays_silent_is_not_waited_for_beyond_the_time_for_answers(step, tmp_path):
    with federation(tmp_path, 4, round_timeout_s=1.5) as (there, clients):
        clients["site-002"].silent.add((step, 1, 0))
        under_way, survivors = there.opened()
        assert under_way.unopened == 0 and ("site-002" in survivors) == (step in (AGREEMENT, REVEAL))
        assert "site-002" not in there.opened(2)[1], "it is left out of the next round, so that it delays only one"


def test_a_client_that_is_silent_about_the_roster_is_not_told_it_in_every_round(tmp_path):
    class Mute(SumClient):
        def answer(self, request):
            answer = super().answer(request)
            return None if request.HasField("roster") else answer

    with federation(tmp_path, 3, round_timeout_s=0.5) as (there, clients):
        clients["site-003"] = Mute(there.engine.address, "site-003", there.plan).start()
        there.await_ready(4)
        for number in (1, 2, 3, 4):
            assert there.opened(number)[1] == NAMES[:3]
        assert len(clients["site-003"].rosters) == 2, "in rounds 1 and 3"


def test_uploads_that_cannot_be_stored_are_waited_for_beyond_the_time_limit(tmp_path):
    class Outage(Heard):
        reasons, outage = (), ExitStack()

        def asked(self, round, attempt, names):
            self.outage.enter_context(no_file_left())
            threading.Timer(2.5, self.outage.close).start()

        def held_up(self, reason):
            self.reasons += (reason,)

    with federation(tmp_path, 3, round_timeout_s=1.0) as (there, _):
        there.heard = Outage()
        try:
            assert there.opened()[1] == NAMES[:3]
        finally:
            there.heard.outage.close()
        assert len(there.heard.reasons) == 1 and "uploads cannot be stored" in there.heard.reasons[0]


def test_beyond_the_most_members_others_wait_and_the_roster_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(sum_roster, "MOST_MEMBERS", 4)
    with federation(tmp_path, 5) as (there, _):
        first, second = there.opened(1)[1], there.opened(2)[1]
        assert len(first) == 4 and first == second and len(there.heard.made) == 1


def test_a_client_that_refuses_the_roster_is_named_and_the_others_go_on(tmp_path):
    with federation(tmp_path, 4) as (there, clients):
        clients["site-003"].declines = True
        under_way, survivors = there.opened()
        assert survivors == NAMES[:3] and under_way.refused == {"site-003": "policy"}
        assert len(there.heard.made) == 1, "the others keep the roster"


@pytest.mark.parametrize(("noise", "says"), [(0.0, "give --least-noise"), (1e300, "can exceed 64 bits")])
def test_a_client_whose_noise_fits_no_sum_is_left_out_and_named(noise, says, tmp_path):
    with federation(tmp_path, 3) as (there, clients):
        clients["site-003"] = SumClient(there.engine.address, "site-003", there.plan, noise=noise).start()
        there.await_ready(4)
        assert there.opened()[1] == NAMES[:3]
        assert says in there.heard.out["site-003"]


def test_a_least_noise_stands_for_the_noise_that_is_not_said(tmp_path):
    plan = secure_plan(3, least_noise=0.5)
    with federation(tmp_path, 3, plan=plan) as (there, clients):
        clients["site-003"] = SumClient(there.engine.address, "site-003", plan, noise=0.0).start()
        there.await_ready(4)
        assert there.opened()[1] == NAMES[:4]
        roster = there.rosters.roster
        expected_noise = 0.5 * roster.grid.sensitivity(roster.values, plan.clip_norm)
        assert expected_noise * (1 - 1e-9) < roster.noise < expected_noise


@pytest.mark.parametrize("members", [100 if WHOLE else 25])
def test_sums_of_many_are_opened_until_more_than_a_third_have_dropped_out(tmp_path, members):
    threshold = sum_threshold(members)
    spare = members - threshold
    going = {2: NAMES[:1], 3: NAMES[1:spare], 4: NAMES[spare:spare + 1]}  # round → who drops out in it
    drops = {name: [((UPLOAD, AGREEMENT, REVEAL)[i % 3], number, 0)] for number, names in going.items()
             for i, name in enumerate(names)}
    with federation(tmp_path, members, drops, secure_plan(threshold + 1, colluding=1)) as (there, _):
        for number, missing in ((1, 0), (2, 1), (3, 1 + -(-(spare - 1) // 3))):  # a third goes before it uploads
            under_way, survivors = there.opened(number)
            assert under_way.unopened == 0 and len(survivors) == members - missing
        with pytest.raises(Ended, match="wait-timeout") as ended:
            there.opened(4)
        assert f"{threshold - 1} uploads are in the sum, and {threshold} must be" in ended.value.why
        assert len(there.heard.why) == len(there.heard.made) == 1
