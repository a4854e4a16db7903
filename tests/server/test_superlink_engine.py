"""The SuperLink engine on a Grid in this process, whose nodes run the client's own Flower app."""

import dataclasses
import threading
import time
import uuid

import numpy as np
import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedlora.plan import Proposal, Refusal, RoundPlan
from fedlora.wire import pb
from fedlora_client.flower_app import client_app
from fedlora_server.engine import node_id
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import Run, run_federation
from fedlora_server.superlink_engine import SuperLinkEngine
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FedSB, strategy_class
from fedlora_strategies.messages import assign_id, assume_identity, to_record, train_message
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of
from tests.fedlora.ledgers import no_file_left

PLAN = plan_of("fedavg-lora")
LAYOUT = layout_of(PLAN.family)
SECONDS = 20.0


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr("fedlora_server.superlink_engine.LOOK_EVERY_S", 0.01)
    assume_identity("0" * 15 + "1")  # the id of Flower's run, as in a ServerApp


class LinearNode(LinearSession):
    """A node that gives `answer` when asked to join, and answers orders while `answers` is true."""

    def __init__(self, name, layout=LAYOUT, answer=()):
        super().__init__(name, layout)
        self.private, self.answer, self.welcomed = False, answer, []
        self.answers = threading.Event()
        self.answers.set()

    def join(self, proposal):
        self.welcomed.append(proposal)
        return self.answer


class SuperLink(Grid):
    """A Grid of nodes by Flower's ids. A message to an offline node is answered by Flower's NODE_UNAVAILABLE."""

    def __init__(self, nodes):
        self.nodes, self.mail, self.down = dict(nodes), {}, False

    def set_run(self, run): ...

    @property
    def run(self):
        return None

    def create_message(self, *arguments):
        pytest.fail("messages are made by fedlora_strategies.messages")

    def send_and_receive(self, messages, *, timeout=None):
        pytest.fail("the engine pushes and pulls; it never waits for all replies at once")

    def get_node_ids(self):
        if self.down:
            raise ConnectionError("the SuperLink is gone")
        return list(self.nodes)

    def push_messages(self, messages):
        for message in messages:
            assign_id(message, uuid.uuid4().hex)
            self.mail[message.metadata.message_id] = message
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        replies = []
        for message_id in message_ids:
            message = self.mail[message_id]
            node = self.nodes.get(number := message.metadata.dst_node_id)
            if node is None:
                replies.append(Message(Error(ErrorCode.NODE_UNAVAILABLE, "offline"), reply_to=message))
            elif message.metadata.message_type == "query" or node.answers.is_set():
                replies.append(client_app(lambda _, node=node: node)(message, Context(1, number, {}, RecordDict(), {})))
        return replies


@pytest.fixture
def engine_of(tmp_path):
    made = []

    def make(grid, plan=PLAN, layout=LAYOUT):
        events = []
        engine = SuperLinkEngine(grid, Proposal(plan), tmp_path / "uploads", events.append)
        made.append(engine)
        engine.events = events
        engine.expect(layout)
        return engine

    yield make
    for engine in made:
        engine.close("the test is over")
    assert not (tmp_path / "uploads").exists(), "an upload was left behind"


def until(engine, true):
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, engine.events
        engine.wait((), 0.05)


def until_idle(engine, *names):
    until(engine, lambda: [engine.name_of(node) for node in engine.idle()] == list(names))


def until_outcome(engine, message_id):
    until(engine, lambda: engine.wait([message_id], 0.05))
    return engine.wait([message_id], 0.0)[message_id]


def order(name, attempt=0):
    plan = RoundPlan(PLAN, 1, attempt, "0" * 64)
    return train_message(plan, to_record(start_of(LAYOUT, 0)), node_id(name))


@pytest.mark.parametrize(("strategy", "wire_dtype"), [*((name, "fp32") for name in STRATEGIES),
                                                      ("fedsvd", "bf16")])
def test_supernodes_and_one_process_end_with_the_same_bits(engine_of, strategy, wire_dtype):
    plan = plan_of(strategy, wire_dtype=wire_dtype)
    layout = layout_of(plan.family)
    grid = SuperLink({2**64 - 1 - i: LinearNode(name, layout) for i, name in enumerate("dbca")})
    engines = engine_of(grid, plan, layout), InProcessEngine(
        {name: LinearSession(name, layout) for name in "abcd"}, plan.run_id, layout)
    over_flower, alone = (
        run_federation(engine, Run(strategy_class(strategy)(plan, layout), start_of(layout, 1),
                                   RoundOptions(seed=5, clients_per_round=3, min_clients=4))) for engine in engines)
    engines[1].close("")
    assert over_flower.ended == alone.ended == "finished"
    for theirs, ours in zip(over_flower.records, alone.records, strict=True):
        assert dataclasses.replace(theirs, seconds=0.0) == dataclasses.replace(ours, seconds=0.0)
    assert all(np.array_equal(over_flower.state[name], alone.state[name]) for name in alone.state)


def test_a_node_that_lost_the_frozen_tensors_is_sent_them_again(engine_of):
    plan = plan_of("fed-sb")
    layout = layout_of(plan.family)
    node = LinearNode("a", layout)
    node.forgets_in = 2
    result = run_federation(engine_of(SuperLink({1: node}), plan, layout),
                            Run(FedSB(plan, layout), start_of(layout, 1), RoundOptions(seed=5)))
    assert result.ended == "finished" and [record.attempts for record in result.records] == [1, 2, 1]


def test_a_node_that_declines_or_whose_name_is_taken_is_never_asked_to_train(engine_of):
    nodes = {1: LinearNode("a"), 2: LinearNode("a"), 3: LinearNode("b", answer=Refusal("policy"))}
    engine = engine_of(SuperLink(nodes))
    until(engine, lambda: len([e for e in engine.events if e.kind == "declined"]) == 2)
    until_idle(engine, "a")
    assert {e.detail.rpartition("[")[2] for e in engine.events if e.kind == "declined"} == {"name-in-use]", "policy]"}
    assert [len(node.welcomed) for node in nodes.values()] == [1, 1, 1]


def test_a_private_run_turns_a_node_without_privacy_away(engine_of):
    engine = engine_of(SuperLink({1: LinearNode("a")}), plan_of("fedavg-lora", private=True))
    until(engine, lambda: engine.events)
    assert engine.events[0].kind == "declined" and "privacy-mismatch" in engine.events[0].detail


class Drifted(SuperLink):
    """A SuperLink that rewrites the frame `key` on its way, as if its sender had a schema with a further field."""

    def __init__(self, nodes, key):
        super().__init__(nodes)
        self.key = key

    def rewritten(self, message):
        kind = pb.ServerFrame if self.key == "welcome" else pb.ClientFrame
        config = message.content["config"]
        frame = kind.FromString(config[self.key])
        if self.key != "ready":
            getattr(frame, self.key).schema = b"\xab" * 32
        config[self.key] = frame.SerializeToString() + b"\xa0\x06\x01"
        return message

    def push_messages(self, messages):
        return super().push_messages([self.rewritten(m) for m in messages] if self.key == "welcome" else messages)

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        return replies if self.key == "welcome" else [self.rewritten(reply) for reply in replies]


@pytest.mark.parametrize(("key", "kind", "detail"), [
    ("welcome", "declined", "version-mismatch"), ("join", "declined", "version-mismatch"),
    ("ready", "refused", "does not know")])
def test_a_node_of_another_schema_is_turned_away_by_name_and_trains_nothing(engine_of, key, kind, detail):
    node = LinearNode("a")
    engine = engine_of(Drifted({1: node}, key))
    until(engine, lambda: any(event.kind == kind for event in engine.events))
    [event] = [event for event in engine.events if event.kind == kind]
    assert detail in event.detail and (key == "ready" or "schema abababab" in event.detail)
    assert engine.idle() == [] and node.keys == [] and len(node.welcomed) == (key != "welcome")


def test_labels_are_announced_only_where_they_are_asked_for(engine_of):
    engine = engine_of(SuperLink({1: LinearNode("a", answer=("no", "yes"))}), PLAN.with_open_labels())
    until_idle(engine, "a")
    assert engine.members()[0].announced_labels == ("no", "yes")
    engine = engine_of(SuperLink({1: LinearNode("b", answer=("secret",))}))
    until(engine, lambda: engine.events and engine.events[-1].kind == "refused")
    assert engine.idle() == []


def test_a_node_that_comes_back_under_another_number_is_asked_again_for_the_same_order(engine_of):
    node = LinearNode("a")
    grid = SuperLink({1: node})
    engine = engine_of(grid)
    until_idle(engine, "a")
    node.answers.clear()
    [pushed] = engine.push_messages([order("a")])
    assert engine.idle() == []
    del grid.nodes[1]
    assert until_outcome(engine, pushed) == "lost"
    node.answers.set()
    grid.nodes[2] = node
    until(engine, lambda: engine.wait([pushed], 0.05).get(pushed) == "uploaded")
    assert node.keys == [(1, 0)] and len(list(engine.pull_messages([pushed]))) == 1


def test_a_cancelled_order_keeps_its_node_busy_until_it_answers_and_adds_nothing(engine_of, tmp_path):
    node = LinearNode("a")
    engine = engine_of(SuperLink({1: node}))
    until_idle(engine, "a")
    node.answers.clear()
    [pushed] = engine.push_messages([order("a")])
    until(engine, lambda: len(engine._asked) == 1)
    engine.cancel([pushed])
    assert engine.idle() == []
    node.answers.set()
    until_idle(engine, "a")
    assert engine.wait([pushed], 0.0) == {} and not list((tmp_path / "uploads").iterdir())


@pytest.mark.parametrize(("change", "code", "text"), [
    (lambda upload: upload.tensors.update({"head.out.bias": np.zeros(4, np.float32)}), "invalid-tensors", "(4,)"),
    (lambda upload: upload.tensors.update({"head.out.bias": np.full(3, np.nan, np.float32)}), "invalid-tensors",
     "not finite"),
    (lambda upload: dataclasses.replace(upload, round=2), "invalid-tensors", "round 2"),
    (lambda upload: dataclasses.replace(upload, num_examples=1.5), "invalid-tensors", ""),
    (lambda upload: dataclasses.replace(upload, steps=-1), "invalid-tensors", "negative")])
def test_an_upload_that_does_not_fit_becomes_a_refusal(engine_of, change, code, text):
    node = LinearNode("a")
    train = node.run_round

    def broken(plan, tensors):
        upload = train(plan, tensors)
        return change(upload) or upload

    node.run_round = broken
    engine = engine_of(SuperLink({1: node}))
    until_idle(engine, "a")
    [pushed] = engine.push_messages([order("a")])
    outcome = until_outcome(engine, pushed)
    assert isinstance(outcome, Refusal) and outcome.code == code and text in outcome.detail
    until_idle(engine, "a")


def test_an_upload_for_which_no_file_can_be_opened_waits_until_one_can(engine_of):
    engine = engine_of(SuperLink({1: LinearNode("a")}))
    until_idle(engine, "a")
    with no_file_left():
        [sent] = engine.push_messages([order("a")])
        until(engine, lambda: engine.held_up)
        assert engine.wait([sent], 0.0) == {}
    assert until_outcome(engine, sent) == "uploaded" and not engine.held_up
    engine.cancel([sent])


def test_a_superlink_that_fails_ends_the_wait_with_where_the_results_are(engine_of):
    grid = SuperLink({1: LinearNode("a")})
    engine = engine_of(grid)
    until_idle(engine, "a")
    grid.down = True
    with pytest.raises(RuntimeError, match="checkpoint"):
        until_idle(engine)
