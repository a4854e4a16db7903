"""A server process that asks its first client for one round: `-m tests.server.one_round_server ADDRESS RUN SPOOL WHEN`.

It listens once it has read a line from stdin, and prints "listening" and "uploaded". With WHEN "stay" it then waits to
be killed, otherwise it says goodbye.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fedlora import wire
from fedlora.plan import Proposal, RoundPlan
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import to_record, train_message
from tests.federation import layout_of, plan_of, start_of


def main(address: str, run_id: str, uploads: str, when: str) -> None:
    run, layout = plan_of("ffa-lora", run_id=run_id), layout_of("frozen-a")
    sys.stdin.readline()
    engine = GrpcEngine(address, Proposal(run), Path(uploads))
    engine.expect(layout)
    print("listening", flush=True)
    while not engine.idle():
        engine.wait([], 1.0)
    state = to_record(start_of(layout, seed=0))
    order = RoundPlan(run, 1, 0, wire.tensors_digest({}))
    sent = engine.push_messages([train_message(order, state, engine.idle()[0])])
    while engine.wait(sent, 1.0).get(sent[0]) != "uploaded":
        pass
    print("uploaded", flush=True)
    if when == "stay":
        signal.pause()
    engine.close("one round was all")


if __name__ == "__main__":
    main(*sys.argv[1:])
