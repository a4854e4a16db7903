"""Secure sums over real connections: what is opened, who may be missing, and what a killed server goes on with."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

from fedlora.plan import AGGREGATE, Proposal
from fedlora_server.client_sampling import Clients
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.round_state import RoundOptions
from fedlora_server.sum_roster import Rosters
from fedlora_server.sum_round import SumRound
from fedlora_server.tls import ServerTls
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import to_record
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.secure_sums import authority
from tests.sum_clients import AGREEMENT, NAMES, PACKAGE, REVEAL, UPLOAD, expected, started


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
        self.options = RoundOptions(**{"seed": 0, "min_clients": plan.least_members, "wait_timeout_s": 1.0} | options)
        self.clients, self.heard, self.stop = Clients(self.engine, plan, 0), Heard(), threading.Event()
        self.rosters = Rosters(self.engine, self.clients, plan, self.layout.num_trained, self.options, self.heard,
                               self.stop, lambda write: None)

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
        for client in clients.values():
            client.leave()
        there.engine.close("the test is over")


@pytest.mark.parametrize("count", [3, 6])
def test_the_opened_sum_is_the_plain_sum_of_the_vectors(count, tmp_path):
    with federation(tmp_path, count) as (there, clients):
        for number in (1, 2):
            under_way, survivors = there.opened(number)
            assert survivors == NAMES[:count] == under_way.cohort
        assert [len(client.rosters) for client in clients.values()] == [1] * count, "one roster serves both rounds"


@pytest.mark.parametrize("step", [PACKAGE, UPLOAD, AGREEMENT, REVEAL])
def test_a_sum_is_opened_though_a_client_drops_out_in_any_phase(step, tmp_path):
    with federation(tmp_path, 6, {"site-001": [(step, 1, 0)]}) as (there, _):
        under_way, survivors = there.opened()
        assert ("site-001" in survivors) == (step in (AGREEMENT, REVEAL))
        assert under_way.unopened == 0 and len(survivors) >= 5
