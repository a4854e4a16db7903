"""The round loop over real connections gives the same bits as in one process."""

import threading

import numpy as np
import pytest

from fedlora.plan import WIRE_DTYPES, Proposal
from fedlora_client.connection import Connection, Goodbye
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import strategy_class
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of


def serve(session, address, rounds):
    """Answer orders as a client that leaves after `rounds` of them without a word."""
    connection = Connection(address, session.name, private=False, connect_timeout_s=20.0)
    try:
        connection.join()
        connection.ready()
        for _ in range(rounds):
            plan, tensors = connection.next_request()
            connection.send(session.run_round(plan, tensors))
        connection.leave()
    except Goodbye:
        pass


def federate(strategy, folder, *, leaver=None, forgetful=None, wire_dtype="fp32", **options):
    """Run over gRPC with clients a to d. After round 1, one may leave, and one may forget the frozen tensors."""
    plan, seed = plan_of(strategy, wire_dtype=wire_dtype), 5
    layout = layout_of(plan.family)
    sessions = {name: LinearSession(name, layout) for name in "abcd"}
    if forgetful:
        sessions[forgetful].forgets_in = 2
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), folder)
    engine.expect(layout)
    threads = [threading.Thread(target=serve, args=(s, engine.address, 1 if name == leaver else 99), daemon=True)
               for name, s in sessions.items()]
    for thread in threads:
        thread.start()
    try:
        result = run_federation(engine, Run(strategy_class(strategy)(plan, layout), start_of(layout, 1),
                                            RoundOptions(seed=seed, min_clients=4, wait_timeout_s=20.0, **options)))
    finally:
        engine.close("the test is over")
    for thread in threads:
        thread.join(10.0)
    return result, sessions


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_grpc_and_one_process_end_with_the_same_bits(strategy, wire_dtype, tmp_path):
    over_grpc, _ = federate(strategy, tmp_path, clients_per_round=3, wire_dtype=wire_dtype)
    plan = plan_of(strategy, wire_dtype=wire_dtype)
    layout = layout_of(plan.family)
    engine = InProcessEngine({name: LinearSession(name, layout) for name in "dbca"}, plan.run_id, layout)
    alone = run_federation(engine, Run(strategy_class(strategy)(plan, layout), start_of(layout, 1),
                                       RoundOptions(seed=5, clients_per_round=3)))
    assert over_grpc.ended == alone.ended == "finished"
    assert [r.uploaded for r in over_grpc.records] == [r.uploaded for r in alone.records]
    assert all(np.array_equal(over_grpc.state[name], alone.state[name]) for name in alone.state)


def test_a_client_that_leaves_does_not_hold_up_the_others(tmp_path):
    result, sessions = federate("fedsvd", tmp_path, leaver="b")
    assert result.ended == "finished" and result.records[-1].uploaded == ("a", "c", "d")
    assert len(sessions["b"].keys) == 1


def test_a_client_that_forgot_the_frozen_tensors_is_sent_them_again(tmp_path):
    result, sessions = federate("fed-sb", tmp_path, forgetful="c", min_replies=4)
    assert result.ended == "finished" and [r.attempts for r in result.records] == [1, 2, 1]
    assert sessions["c"].keys == [(1, 0), (2, 1), (3, 0)]
