"""A server of secure sums that is killed anywhere goes on in the same phase: nobody trains or signs twice."""

import signal

import numpy as np
import pytest

from fedlora.plan import AGGREGATE, Proposal
from fedlora.secure_sum.roster import Entry, run_digest
from fedlora_server import checkpoint, sum_files
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.sum_roster import formed
from fedlora_server.tls import ServerTls
from fedlora_strategies import strategy_class
from fedlora_strategies.messages import to_record, to_tensors
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.secure_sums import authority
from tests.kills import AFTER, BEFORE, act_at, die
from tests.processes import FORKS, PATIENCE, free_port
from tests.sum_clients import NAMES, SumClient, expected, leave, started

ROUNDS = 2
FILES, COLLECTOR = "fedlora_server.sum_files", "fedlora.secure_sum.collector:Collector"
POINTS = {
    "before the roster is stored": (f"{FILES}:keep_roster", BEFORE, 1),
    "before the roster is told": (f"{FILES}:keep_roster", AFTER, 1),
    "while key packages come": (f"{COLLECTOR}.add_package", AFTER, 2),
    "before the cohort is stored": (f"{FILES}:keep", BEFORE, 1),
    "before it is noted whom the round asks": (f"{FILES}:keep", AFTER, 1),
    "before the cohort is asked to train": ("fedlora_server.checkpoint:remember", AFTER, 1),
    "while uploads come": ("fedlora_server.upload_store:IncomingUpload.stored", AFTER, 2),
    "before the sum is stored": (f"{FILES}:keep_total", BEFORE, 1),
    "before the survivors are stored": (f"{FILES}:keep", BEFORE, 2),
    "before the survivors are asked to sign": (f"{FILES}:keep", AFTER, 2),
    "while signatures come": (f"{COLLECTOR}.add_signature", AFTER, 2),
    "before shares are asked for": (f"{FILES}:keep", AFTER, 3),
    "while shares come": (f"{COLLECTOR}.add_reveal", AFTER, 2),
    "before the sum is opened": (f"{FILES}:keep", AFTER, 4),
    "once the sum is opened": (f"{COLLECTOR}.opened", AFTER, 1),
    "before the round's checkpoint": ("fedlora_server.checkpoint:save", BEFORE, 2),  # the first is that of the start
    "before the sum's files are removed": (f"{FILES}:clear", BEFORE, 1),
    "in the second round, before the survivors are asked to sign": (f"{FILES}:keep", AFTER, 6),
}
"""Point in the server → function, when in its call, and in which call the server is killed."""


def secure_plan():
    return plan_of("ffa-lora", private=True, mechanism=AGGREGATE, least_members=3, local_steps=1, rounds=ROUNDS,
                   max_participations=9)


def serve(folder, tls, port, point):
    """Run a server of three clients until its end, or until it is killed at the point."""
    if point:
        where, when, occurrence = POINTS[point]
        act_at(where, when, occurrence, lambda: True, die)
    plan, layout = secure_plan(), layout_of("frozen-a")
    left = checkpoint.take_up(folder) if (folder / checkpoint.ABOUT).exists() else None
    engine = GrpcEngine(f"127.0.0.1:{port}", Proposal(plan), folder / "uploads", tls=ServerTls(tls),
                        under_way=left.under_way if left else None, names=folder / "names")
    checkpoint.begin(folder, {}, plan, {}, left.resumptions if left else ())
    engine.keep_names()
    engine.expect(layout)
    run = Run(strategy_class(plan.strategy)(plan, layout), start_of(layout, 1),
              RoundOptions(seed=0, min_clients=3, wait_timeout_s=20.0 * PATIENCE), out=folder, left=left,
              left_sum=sum_files.take_up(folder, run_digest(plan)))
    result = run_federation(engine, run)
    engine.close("the test is over")
    assert result.ended == "finished", (result.ended, result.why)


def run_server(folder, port, point=""):
    process = FORKS.Process(target=serve, args=(folder, authority().folder, port, point))
    process.start()
    process.join(60 * PATIENCE)
    return process.exitcode


def plain_state():
    """Return the state after all rounds, from plain sums of the clients' vectors."""
    plan, layout = secure_plan(), layout_of("frozen-a")
    strategy, arrays = strategy_class(plan.strategy)(plan, layout), to_record(start_of(layout, 1))
    for number in range(1, ROUNDS + 1):
        values = strategy.sum_order(number, arrays).values
        total = expected((plan.run_id, number, 0), NAMES[:3], values)
        arrays, _ = strategy.aggregate_sum(number, total, grid_of(plan, layout), 3)
    return to_tensors(arrays)


def grid_of(plan, layout):
    return formed(plan, {Entry(name, b"", b"", b""): 1.0 for name in NAMES[:3]}, layout.num_trained).grid


@pytest.mark.parametrize("point", POINTS)
def test_a_server_that_is_killed_ends_with_the_state_of_the_plain_sums(point, tmp_path):
    port = free_port()
    clients = started(f"127.0.0.1:{port}", 3, secure_plan())
    try:
        assert run_server(tmp_path, port, point) == -signal.SIGKILL
        assert run_server(tmp_path, port) == 0
    finally:
        leave(clients.values())
    found, wanted = checkpoint.load(tmp_path), plain_state()
    assert found.round == ROUNDS and all(np.array_equal(found.state[name], wanted[name]) for name in wanted)
    for client in clients.values():
        assert client.trained == [(secure_plan().run_id, number, 0) for number in (1, 2)]
        assert all(len(sets) == 1 for sets in client.signed.values())
    left = {path.name for path in tmp_path.iterdir()}
    assert sum_files.ROSTER in left and not left & {sum_files.SUM, sum_files.TOTAL}
    records = checkpoint.finished_records(tmp_path, ROUNDS)
    assert [(record.round, record.uploaded, record.unopened) for record in records if record.round] == [
        (1, NAMES[:3], 0), (2, NAMES[:3], 0)]


def test_a_server_goes_on_though_a_client_of_the_cohort_that_it_takes_up_never_returns(tmp_path):
    port = free_port()
    clients = started(f"127.0.0.1:{port}", 3, secure_plan())
    try:
        assert run_server(tmp_path, port, "before it is noted whom the round asks") == -signal.SIGKILL
        leave([clients.pop("site-002")])
        clients["site-003"] = SumClient(f"127.0.0.1:{port}", "site-003", secure_plan()).start()
        assert run_server(tmp_path, port) == 0
    finally:
        leave(clients.values())
    first = next(record for record in checkpoint.finished_records(tmp_path, ROUNDS) if record.round == 1)
    assert (first.uploaded, first.unopened) == (("site-000", "site-001", "site-003"), 1)
