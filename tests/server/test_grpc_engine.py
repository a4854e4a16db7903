"""The gRPC engine on real connections: messages arrive, lost clients are noticed, nobody trains twice for an order."""

import contextlib
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess

import numpy as np
import pytest

from fedlora import wire
from fedlora.plan import Proposal, Refusal, Refused, RoundPlan, Upload
from fedlora_client.connection import Connection, Goodbye, ServerUnreachable
from fedlora_client.stream import Stream
from fedlora_server.engine import node_id
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import read_reply, to_record, train_message
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.ledgers import full_disk
from tests.processes import FORKS
from tests.server.federated_clients import KeptSecrets, start_client
from tests.server.one_round_server import one_round
from tests.server.tcp_proxy import TcpProxy

RUN = plan_of("ffa-lora")
LAYOUT = layout_of("frozen-a")
STATE = start_of(LAYOUT, seed=1)
UPLOAD = {spec.name: STATE[spec.name] for spec in LAYOUT.trained}
PATIENCE_S = 20.0


@pytest.fixture
def engine(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads")
    engine.expect(LAYOUT)
    yield engine
    engine.close("the test is over")


def until(condition, engine: GrpcEngine) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        engine.wait([], 0.1)


def order(node: int, number: int = 1, attempt: int = 0, state=STATE):
    return train_message(RoundPlan(RUN, number, attempt, wire.tensors_digest({})), to_record(state), node)


def connect(engine: GrpcEngine, name: str, address: str | None = None, **kwargs) -> Connection:
    connection = Connection(address or engine.address, name, private=False, connect_timeout_s=10, **kwargs)
    connection.join()
    connection.ready()
    until(lambda: node_id(name) in engine.idle(), engine)
    return connection


def outcome(engine: GrpcEngine, message_id: str):
    until(lambda: message_id in engine.wait([message_id], 0.1), engine)
    return engine.wait([message_id], 0)[message_id]


def test_what_is_sent_comes_back_in_the_order_asked_until_it_is_cancelled(engine, processes, tmp_path):
    names = ["north", "south", "west"]
    processes += [start_client(engine.address, name) for name in names]
    until(lambda: len(engine.idle()) == 3, engine)
    nodes = engine.idle()
    assert [engine.name_of(node) for node in nodes] == names
    sent = engine.push_messages(order(node) for node in nodes)
    until(lambda: len(engine.wait(sent, 0.1)) == 3, engine)
    assert len(list((tmp_path / "uploads").iterdir())) == 3
    replies = engine.pull_messages(reversed(sent))
    first = next(replies)
    uploads = [read_reply(message) for message in (first, *replies)]
    assert first.metadata.src_node_id == nodes[-1]
    assert all(np.array_equal(upload.tensors[name], UPLOAD[name]) for upload in uploads for name in UPLOAD)
    assert len(list(engine.pull_messages(sent))) == 3 == len(list((tmp_path / "uploads").iterdir()))
    engine.cancel(sent)
    assert not list(engine.pull_messages(sent))
    assert not list((tmp_path / "uploads").iterdir())
    assert engine.bytes_up > 3 * 4 * LAYOUT.num_trained < engine.bytes_down
    engine.close("all done")
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0, 0], "no client imports Flower or torch"


def test_an_upload_that_a_full_disk_cannot_take_is_declined_and_the_next_one_is_taken(engine, tmp_path):
    connection = connect(engine, "north")
    for attempt, disk, expected in ((0, full_disk, "unavailable"), (1, contextlib.nullcontext, None)):
        sent, = engine.push_messages([order(node_id("north"), attempt=attempt)])
        plan, _ = connection.next_request()
        with disk():
            refusal = connection.send(Upload(*plan.key, tensors=UPLOAD, steps=1, num_examples=10))
        assert (refusal and refusal.code) == expected
        assert getattr(outcome(engine, sent), "code", None) == expected
        assert len(list((tmp_path / "uploads").iterdir())) == (expected is None)
        assert read_reply(*engine.pull_messages([sent])) is not None
    connection.leave()


def test_a_task_that_comes_while_ready_is_still_being_said_is_taken(engine, monkeypatch):
    send = Stream.send

    def slow(stream, frame):
        send(stream, frame)
        if frame.WhichOneof("kind") == "ready":
            until(engine.idle, engine)
            engine.push_messages([order(node_id("north"))])
            time.sleep(0.5)

    monkeypatch.setattr(Stream, "send", slow)
    connection = Connection(engine.address, "north", private=False, connect_timeout_s=10)
    connection.join()
    connection.ready()
    assert connection.next_request()[0].round == 1
    connection.leave()


def test_a_killed_client_is_noticed_in_seconds(engine, processes):
    processes.append(start_client(engine.address, "north", "hang"))
    until(engine.idle, engine)
    [sent] = engine.push_messages([order(node_id("north"))])
    time.sleep(0.3)
    begin = time.monotonic()
    processes[0].send_signal(signal.SIGKILL)
    assert outcome(engine, sent) == "lost"
    assert time.monotonic() - begin < 5
    assert engine.idle() == [] and list(engine.get_node_ids()) == []


def test_a_frozen_client_is_noticed_and_asked_again_when_it_thaws(engine, processes):
    processes.append(start_client(engine.address, "north", "hang"))
    until(engine.idle, engine)
    [sent] = engine.push_messages([order(node_id("north"))])
    time.sleep(0.3)
    processes[0].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    while engine.wait([sent], 1.0).get(sent) != "lost":
        assert time.monotonic() - begin < 60
    processes[0].send_signal(signal.SIGCONT)
    until(lambda: sent not in engine.wait([sent], 0.1), engine)
    until(engine.get_node_ids, engine)


def test_a_client_that_comes_back_before_the_round_closes_is_asked_again(engine, processes, tmp_path):
    processes.append(start_client(engine.address, "north", "hang", tmp_path / "state"))
    until(engine.idle, engine)
    [sent] = engine.push_messages([order(node_id("north"))])
    time.sleep(0.3)
    processes[0].kill()
    assert outcome(engine, sent) == "lost"
    processes.append(start_client(engine.address, "north", state=tmp_path / "state"))
    until(lambda: engine.wait([sent], 0.1).get(sent) == "uploaded", engine)


def test_an_order_is_not_given_twice_to_one_client(engine):
    connect(engine, "north")
    engine.push_messages([order(node_id("north"))])
    with pytest.raises(ValueError, match="'north' was asked for round 1, attempt 0 before"):
        engine.push_messages([order(node_id("north"))])
    engine.push_messages([order(node_id("north"), attempt=1)])


def test_a_cancelled_client_stops_and_is_idle_again(engine, processes):
    processes.append(start_client(engine.address, "north", "hang"))
    until(engine.idle, engine)
    [sent] = engine.push_messages([order(node_id("north"))])
    time.sleep(0.3)
    assert engine.idle() == []
    engine.cancel([sent])
    until(engine.idle, engine)
    assert list(engine.pull_messages([sent])) == []


def test_an_upload_for_a_closed_round_is_refused_and_adds_nothing(engine, tmp_path):
    connection = connect(engine, "north")
    [sent] = engine.push_messages([order(node_id("north"))])
    plan, _ = connection.next_request()
    engine.cancel([sent])
    assert connection.send(Upload(*plan.key, tensors=UPLOAD, steps=1)).code == "too-late"
    assert not list((tmp_path / "uploads").iterdir())
    until(engine.idle, engine)


@pytest.mark.parametrize("spoil", [
    lambda t: {**t, "head.out.bias": np.zeros(4, np.float32)},
    lambda t: {**t, "extra": np.zeros(3, np.float32)},
    lambda t: {name: array for name, array in t.items() if name != "head.out.bias"},
    lambda t: {**t, "head.out.bias": np.array([0, np.nan, 0], np.float32)},
    lambda t: {**t, "head.out.bias": np.zeros(64 << 20, np.float32)},
], ids=["shape", "unknown", "missing", "not-finite", "oversized"])
def test_a_bad_upload_is_refused_and_the_client_stays(engine, spoil, tmp_path):
    connection = connect(engine, "north")
    [sent] = engine.push_messages([order(node_id("north"))])
    plan, _ = connection.next_request()
    assert connection.send(Upload(*plan.key, tensors=spoil(UPLOAD), steps=1)).code == "invalid-tensors"
    assert isinstance(outcome(engine, sent), Refusal) and outcome(engine, sent).code == "invalid-tensors"
    [reply] = engine.pull_messages([sent])
    assert read_reply(reply).code == "invalid-tensors"
    assert not list((tmp_path / "uploads").iterdir())
    [sent] = engine.push_messages([order(node_id("north"), number=2)])
    plan, _ = connection.next_request()
    assert connection.send(Upload(*plan.key, tensors=UPLOAD, steps=1)) is None
    assert outcome(engine, sent) == "uploaded"


def test_an_upload_that_is_refused_while_it_is_under_way_is_not_sent_to_its_end(engine):
    connection = connect(engine, "north")
    large = {**UPLOAD, "head.out.bias": np.zeros(64 << 20, np.float32)}
    for number, tensors, code in [(1, large, "invalid-tensors"), (2, UPLOAD, None)]:
        engine.push_messages([order(node_id("north"), number)])
        plan, _ = connection.next_request()
        refusal = connection.send(Upload(*plan.key, tensors=tensors, steps=1))
        assert (refusal.code if refusal else None) == code
    assert connection.bytes_up < large["head.out.bias"].nbytes


def test_a_refusal_reaches_the_round_loop(engine):
    connection = connect(engine, "north")
    [sent] = engine.push_messages([order(node_id("north"))])
    connection.next_request()
    assert connection.send(Refusal("budget")) is None
    assert outcome(engine, sent) == Refusal("budget")


def test_a_server_that_sends_values_that_are_not_finite_is_refused_by_the_client(engine):
    connect(engine, "north")
    bad = {**STATE, "head.out.bias": np.full(3, np.inf, np.float32)}
    [sent] = engine.push_messages([order(node_id("north"), state=bad)])
    assert outcome(engine, sent).code == "invalid-tensors"
    until(engine.idle, engine)


def test_a_client_refuses_more_tensors_than_it_takes(engine):
    connect(engine, "north").max_tensor_bytes = 16
    [sent] = engine.push_messages([order(node_id("north"))])
    assert outcome(engine, sent).code == "invalid-tensors"


def test_a_broken_link_costs_no_second_training_and_no_second_download(engine):
    proxy = TcpProxy(engine.address)
    connection = connect(engine, "north", proxy.address)
    [sent] = engine.push_messages([order(node_id("north"))])
    plan, _ = connection.next_request()
    down = connection.bytes_down
    proxy.cut()
    assert outcome(engine, sent) == "lost"
    answers: list[Refusal | None] = []
    thread = threading.Thread(target=lambda: answers.append(
        connection.send(Upload(*plan.key, tensors=UPLOAD, steps=1))))
    thread.start()
    time.sleep(0.3)
    proxy.restore()
    until(lambda: engine.wait([sent], 0.1).get(sent) == "uploaded", engine)
    thread.join(PATIENCE_S)
    assert answers == [None]
    assert connection.bytes_down - down < 4 * LAYOUT.num_trained + 500, "the task was not sent again"
    until(engine.idle, engine)
    proxy.cut()


def test_an_upload_whose_acknowledgement_was_lost_is_accepted_once(engine):
    proxy = TcpProxy(engine.address)
    connection = connect(engine, "north", proxy.address)
    [sent] = engine.push_messages([order(node_id("north"))])
    plan, _ = connection.next_request()
    proxy.mute_downlink()
    answers: list[Refusal | None] = []
    thread = threading.Thread(target=lambda: answers.append(
        connection.send(Upload(*plan.key, tensors=UPLOAD, steps=1))))
    thread.start()
    assert outcome(engine, sent) == "uploaded"
    assert len(list(engine.pull_messages([sent]))) == 1
    proxy.cut()
    proxy.restore()
    thread.join(PATIENCE_S)
    assert answers == [None]
    proxy.cut()


def test_a_live_name_is_refused_with_the_remedy_and_free_again_afterwards(engine, processes):
    secrets = KeptSecrets()
    connection = connect(engine, "north", secrets=secrets)
    processes.append(start_client(engine.address, "north", stdout=subprocess.PIPE, text=True))
    out, _ = processes[0].communicate(timeout=PATIENCE_S)
    assert processes[0].returncode == 4 and "choose another --name" in out
    assert len(engine.idle()) == 1, "the first one is untouched"
    connection.leave()
    until(lambda: not engine.idle(), engine)
    connect(engine, "north", secrets=secrets)


def test_a_taken_port_is_an_error_that_names_it(tmp_path, engine):
    with pytest.raises(ValueError, match=f"port {engine.address.rpartition(':')[2]} is taken"):
        GrpcEngine(engine.address, Proposal(RUN), tmp_path)


def test_plaintext_beyond_this_machine_needs_insecure(tmp_path):
    with pytest.raises(ValueError, match="--insecure"):
        GrpcEngine("0.0.0.0:0", Proposal(RUN), tmp_path)
    with pytest.raises(ValueError, match="--insecure"):
        Connection("example.org:9092", "north", private=False)


def test_a_client_without_privacy_is_refused_where_it_is_required(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(plan_of("ffa-lora", private=True)), tmp_path)
    with pytest.raises(Refused, match="privacy-mismatch"):
        Connection(engine.address, "north", private=False).join()
    engine.close("done")


def test_labels_are_listed_as_disclosed(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN.with_open_labels()), tmp_path)
    connections = [Connection(engine.address, name, private=False) for name in ("north", "south")]
    for connection, labels in zip(connections, [("no", "yes"), ("maybe",)], strict=True):
        assert connection.join().announce_labels
        connection.ready(labels)
        until(lambda c=connection: any(m.name == c.name and m.ready_at for m in engine.members()), engine)
    assert [(m.name, m.announced_labels) for m in engine.members()] == [
        ("north", ("no", "yes")), ("south", ("maybe",))]
    engine.close("done")


def test_once_the_labels_are_fixed_new_clients_are_asked_for_none_and_old_ones_come_back_as_before(tmp_path):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN.with_open_labels()), tmp_path)
    engine.expect(LAYOUT)
    proxy = TcpProxy(engine.address)
    secrets = KeptSecrets()
    early, slow = (Connection(proxy.address, name, private=False, connect_timeout_s=10, secrets=secrets)
                   for name in ("early", "slow"))
    assert early.join().announce_labels and slow.join().announce_labels
    early.ready(("no", "yes"))
    until(engine.idle, engine)
    engine.fix_labels(("no", "yes"))
    slow.ready(("no",))
    until(lambda: len(engine.idle()) == 2, engine)
    proxy.cut()
    until(lambda: not engine.idle(), engine)
    proxy.restore()
    until(lambda: len(engine.idle()) == 2, engine)
    engine.push_messages(order(node_id(name)) for name in ("early", "slow"))
    assert early.next_request()[0] == slow.next_request()[0]
    early.leave()
    until(lambda: len(engine.get_node_ids()) == 1, engine)
    for name in ("early", "late"):  # a new process of the same client need not announce labels either
        late = Connection(engine.address, name, private=False, secrets=secrets)
        assert late.join() == Proposal(replace(RUN, labels=("no", "yes")), anchor=b"")
        late.ready()
    until(lambda: len(engine.get_node_ids()) == 3, engine)
    assert {m.name: m.announced_labels for m in engine.members()} == {
        "early": ("no", "yes"), "slow": ("no",), "late": ()}
    engine.close("done")
    proxy.cut()


def test_a_message_that_is_not_a_round_plan_and_its_tensors_is_refused_at_push(engine):
    connect(engine, "north")
    wrong_shape = {**STATE, "head.out.bias": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match=r"head\.out\.bias"):
        engine.push_messages([order(node_id("north"), state=wrong_shape)])
    with pytest.raises(ValueError, match="float32"):
        engine.push_messages([order(node_id("north"), state={n: a.astype(np.float64) for n, a in STATE.items()})])
    with pytest.raises(ValueError, match="node id"):
        engine.push_messages([order(12345)])
    message = order(node_id("north"))
    message.content["more"] = message.content["config"]
    with pytest.raises(ValueError, match="exactly one"):
        engine.push_messages([message])


def test_send_and_receive_leaves_lost_clients_out(engine, processes):
    processes += [start_client(engine.address, "north"), start_client(engine.address, "south", "hang")]
    until(lambda: len(engine.idle()) == 2, engine)
    threading.Timer(0.5, processes[1].kill).start()
    replies = list(engine.send_and_receive([order(node_id("south")), order(node_id("north"))], timeout=PATIENCE_S))
    assert [m.metadata.src_node_id for m in replies] == [node_id("north")]


def test_closing_tells_clients_and_a_client_that_leaves_is_not_lost(tmp_path):
    events = []
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path, notify=lambda event: events.append(
        (event.kind, event.name)))
    engine.expect(LAYOUT)
    connect(engine, "north").leave()
    until(lambda: ("left", "north") in events, engine)
    south = connect(engine, "south")
    engine.close("interrupted by its operator")
    with pytest.raises(Goodbye, match="interrupted by its operator"):
        south.next_request()
    assert south.cancelled.is_set()
    engine.close("twice does no harm")
    assert "lost" not in [kind for kind, _ in events]


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_news_of_an_upload_names_its_order_and_the_digest_that_the_client_reports(tmp_path, wire_dtype):
    events, run = [], replace(RUN, wire_dtype=wire_dtype)
    engine = GrpcEngine("127.0.0.1:0", Proposal(run), tmp_path, notify=events.append)
    engine.expect(LAYOUT)
    connection = connect(engine, "north")
    state = to_record(wire.packed(STATE, wire_dtype))
    for attempt in (0, 1):
        engine.push_messages([train_message(RoundPlan(run, 1, attempt, wire.tensors_digest({})), state,
                                            node_id("north"))])
    sent = wire.rounded(UPLOAD, wire_dtype)
    connection.send(Upload(*connection.next_request()[0].key, tensors=sent, steps=1, num_examples=10))
    connection.next_request()
    connection.send(Refusal("budget"))
    connection.leave()
    until(lambda: events[-1].kind == "left", engine)
    engine.close("finished")
    assert [event.kind for event in events] == ["joined", "ready", "uploaded", "refused", "left"]
    uploaded, refused = events[2:4]
    assert (uploaded.name, uploaded.round, uploaded.attempt, uploaded.peer) == ("north", 1, 0, "127.0.0.1")
    assert uploaded.sha256 == wire.tensors_digest(sent)
    assert uploaded.upload_bytes == wire.size_of(wire.shapes_of(UPLOAD), wire_dtype)
    assert (refused.code, refused.round, refused.attempt) == ("budget", 1, 1)


def test_a_client_gives_up_when_there_is_no_server():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        lines: list[str] = []
        connection = Connection(f"127.0.0.1:{taken.getsockname()[1]}", "north", private=False, connect_timeout_s=1.0,
                                report=lines.append)
        with pytest.raises(ServerUnreachable, match="--server"):
            connection.join()
    assert any("No server at" in line for line in lines)


def test_a_server_that_was_killed_and_restarted_is_found_again(processes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    with contextlib.ExitStack() as servers:
        def serve(run_id: str, when: str) -> tuple[BaseProcess, Pipe]:
            heard, tell = FORKS.Pipe(duplex=False)
            process = FORKS.Process(target=one_round, args=(address, run_id, tmp_path / run_id, when, tell))
            process.start()
            servers.callback(process.kill)
            assert heard.recv() == "listening"
            return process, heard

        first, heard = serve("a" * 16, "stay")
        client = start_client(address, "north", stdout=subprocess.PIPE, text=True)
        processes.append(client)
        assert heard.recv() == "uploaded"
        first.kill()
        first.join()
        second, _ = serve("b" * 16, "go")
        out, _ = client.communicate(timeout=60)
        assert "run " + "b" * 16 in out and out.count("task") == 2 and "goodbye" in out
        second.join(PATIENCE_S)
        assert second.exitcode == 0
