"""Client processes that are ready and never answer: at the deadline the others go on, and finish the run."""

import time

from fedlora.plan import Proposal
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_strategies import strategy_class
from tests.federation import layout_of, plan_of, start_of
from tests.server.federated_clients import start_client

ROUND_TIMEOUT_S = 2.0


def test_two_honest_clients_finish_beside_six_that_never_answer(tmp_path, processes):
    plan = plan_of("ffa-lora", rounds=4, max_participations=4)
    layout = layout_of(plan.family)
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path / "uploads")
    honest, silent = ("a", "b"), tuple("cdefgh")
    processes += [start_client(engine.address, name, "silent" if name in silent else "echo")
                  for name in (*honest, *silent)]
    run = Run(strategy_class("ffa-lora")(plan, layout), start_of(layout, 1),
              RoundOptions(seed=0, min_clients=8, round_timeout_s=ROUND_TIMEOUT_S, wait_timeout_s=20.0))
    try:
        engine.expect(layout)
        result = run_federation(engine, run)
    finally:
        engine.close("the run is finished")
    assert result.ended == "finished" and all(record.uploaded == honest for record in result.records)
    assert result.records[0].lost == silent and result.records[0].seconds >= ROUND_TIMEOUT_S
    assert all(set(record.cohort) == set(honest) for record in result.records[1:]), "who is silent is not asked again"
    assert sum(record.seconds for record in result.records[1:]) < 2 * ROUND_TIMEOUT_S
    assert [process.wait(20.0) for process in processes[:2]] == [0, 0]


def test_silent_clients_that_leave_do_not_end_the_run(tmp_path, processes):
    plan = plan_of("ffa-lora", rounds=1)
    layout = layout_of(plan.family)
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path / "uploads")
    processes += [start_client(engine.address, name, how) for name, how in zip(
        "abcd", ("echo", "silent", "silent", "silent"), strict=True)]
    run = Run(strategy_class("ffa-lora")(plan, layout), start_of(layout, 1),
              RoundOptions(seed=0, min_clients=4, round_timeout_s=60.0, wait_timeout_s=0.0))

    class Leaving(Observer):
        def answered(self, round, name, outcome):
            if (name, outcome) == ("a", "uploaded"):
                for process in processes[1:]:
                    process.terminate()

    began = time.monotonic()
    try:
        engine.expect(layout)
        result = run_federation(engine, run, observer=Leaving())
    finally:
        engine.close("the run is finished")
    assert result.ended == "finished" and result.records[0].uploaded == ("a",)
    assert result.records[0].lost == tuple("bcd") and time.monotonic() - began < 60.0
