"""A server, for a process of its own, that asks its first client for one round."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection
from pathlib import Path

from fedlora import wire
from fedlora.plan import Proposal, RoundPlan
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import to_record, train_message
from tests.federation import layout_of, plan_of, start_of


def one_round(address: str, run_id: str, uploads: Path, when: str, tell: Connection) -> None:
    """Listen, send "listening", ask one client, and send "uploaded".

    Args:
        address: where to listen.
        run_id: the run's.
        uploads: folder for what the client sends.
        when: "stay" to wait to be killed afterwards, anything else to say goodbye.
        tell: where to send the two words.
    """
    run, layout = plan_of("ffa-lora", run_id=run_id), layout_of("frozen-a")
    engine = GrpcEngine(address, Proposal(run), uploads)
    engine.expect(layout)
    tell.send("listening")
    while not engine.idle():
        engine.wait([], 1.0)
    state = to_record(start_of(layout, seed=0))
    order = RoundPlan(run, 1, 0, wire.tensors_digest({}))
    sent = engine.push_messages([train_message(order, state, engine.idle()[0])])
    while engine.wait(sent, 1.0).get(sent[0]) != "uploaded":
        pass
    tell.send("uploaded")
    if when == "stay":
        signal.pause()
    engine.close("one round was all")
