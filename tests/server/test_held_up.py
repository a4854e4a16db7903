"""Uploads that arrive while the server's disk is full, or it can open no file: they wait, and nobody trains again."""

import contextlib
import threading
import time

import numpy as np
import pytest

from fedlora.plan import Proposal
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.observer import Observer
from fedlora_server.patience import HeldUp
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.upload_store import new_upload, store
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import to_arrays
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.ledgers import no_file_left
from tests.server.federated_clients import start_client
from tests.server.test_run_folder import small_disk  # noqa: F401

ROUND_TIMEOUT_S, OUTAGE_S = 4.0, 6.0


class Outage(Observer):
    """Lets no file be opened, from round 1's orders until after its clients' time limit."""

    def __init__(self):
        self.reasons, self.outage = [], contextlib.ExitStack()

    def asked(self, round, attempt, names):
        if round == 1:
            self.outage.enter_context(no_file_left())
            threading.Timer(OUTAGE_S, self.outage.close).start()

    def held_up(self, reason):
        self.reasons.append(reason)


def test_uploads_that_cannot_be_stored_are_waited_for_and_nobody_is_lost_or_asked_again(tmp_path, processes):
    plan = plan_of("ffa-lora", rounds=2, max_participations=2)
    layout, watching = layout_of(plan.family), Outage()
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path / "uploads")
    processes += [start_client(engine.address, name) for name in "ab"]
    run = Run(strategy_class("ffa-lora")(plan, layout), start_of(layout, 1),
              RoundOptions(seed=0, min_clients=2, round_timeout_s=ROUND_TIMEOUT_S, wait_timeout_s=0.0))
    try:
        engine.expect(layout)
        result = run_federation(engine, run, observer=watching)
    finally:
        watching.outage.close()
        engine.close("the run is finished")
    assert result.ended == "finished" and result.records[0].seconds >= OUTAGE_S - 0.5
    for record in result.records:
        assert (record.attempts, record.uploaded, record.lost, record.refused) == (1, ("a", "b"), (), {})
    assert len(watching.reasons) == 1 and "Too many open files" in watching.reasons[0]
    assert [process.wait(20.0) for process in processes] == [0, 0]


def test_a_server_that_is_closed_while_uploads_wait_does_not_wait_for_them(tmp_path, processes):
    plan = plan_of("ffa-lora", rounds=1)
    layout, stop = layout_of(plan.family), threading.Event()

    class Stopping(Outage):
        def held_up(self, reason):
            stop.set()

    watching = Stopping()
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan), tmp_path / "uploads")
    processes.append(start_client(engine.address, "a"))
    run = Run(strategy_class("ffa-lora")(plan, layout), start_of(layout, 1), RoundOptions(seed=0))
    try:
        engine.expect(layout)
        result = run_federation(engine, run, observer=watching, stop=stop)
        began = time.monotonic()
    finally:
        engine.close("the coordinator stopped the run")
        took_s = time.monotonic() - began
        watching.outage.close()
    assert result.ended == "stopped" and took_s < OUTAGE_S
    assert processes[0].wait(20.0) == 0 and not engine._sessions


def test_an_upload_on_a_full_disk_is_written_on_where_it_stopped(small_disk):  # noqa: F811
    held_up, reasons, ballast = HeldUp(), [], small_disk / "ballast"
    tensors = {"a": np.arange(150_000, dtype=np.float32), "b": np.arange(3, dtype=np.float32)}
    ballast.write_bytes(bytes(700_000))

    def go_on(fault):
        reasons.append(held_up.reason)
        ballast.unlink()

    stored = store(new_upload(small_disk), tensors, "fp32", {}, held_up.patience(go_on))
    assert reasons == ["No space left on device"] and not held_up.reason
    arrays = to_arrays(stored.read())
    assert all(np.array_equal(arrays[name], tensors[name]) for name in tensors)


def test_who_gives_up_waiting_leaves_no_file(small_disk):  # noqa: F811
    def go_on(fault):
        raise fault

    with pytest.raises(OSError, match="No space left"):
        store(new_upload(small_disk), {"a": np.ones(1 << 20, np.float32)}, "fp32", {}, HeldUp().patience(go_on))
    assert not list(small_disk.iterdir())
