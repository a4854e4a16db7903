"""The in-process engine keeps the promises of `Engine`."""

import numpy as np
import pytest

from fedlora.plan import Refusal, RoundPlan
from fedlora_server.engine import node_id
from fedlora_simulations import in_process
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies.messages import read_reply, to_record, train_message
from tests.federation import LinearSession, layout_of, plan_of, start_of


@pytest.fixture
def engine():
    layout = layout_of("lora")
    made = InProcessEngine({name: LinearSession(name, layout) for name in "cab"}, "0" * 16, layout)
    yield made
    made.close("the test is over")


def orders(engine, names="abc", attempt=0):
    plan = RoundPlan(plan_of("fedavg-lora", run_id="0" * 16), 1, attempt, "0" * 64)
    arrays = to_record(start_of(layout_of("lora"), 0))
    return [train_message(plan, arrays, node_id(name)) for name in names]


def test_clients_are_idle_by_name_and_busy_while_they_are_asked(engine):
    assert [engine.name_of(node) for node in engine.idle()] == ["a", "b", "c"]
    [pushed] = engine.push_messages(orders(engine, "b"))
    assert [engine.name_of(node) for node in engine.idle()] == ["a", "c"]
    assert engine.wait([pushed], 0.0) == {pushed: "uploaded"}
    assert len(engine.idle()) == 3
    with pytest.raises(ValueError, match="ever joined"):
        engine.name_of(5)


def test_wait_lets_clients_train_until_its_turn_is_over(engine, monkeypatch):
    monkeypatch.setattr(in_process, "TURN_S", 0.0)
    pushed = engine.push_messages(orders(engine))
    assert [len(engine.wait(pushed, 0.0)) for _ in range(4)] == [1, 2, 3, 3]
    monkeypatch.setattr(in_process, "TURN_S", 60.0)
    assert len(engine.wait(engine.push_messages(orders(engine, attempt=1)), 0.0)) == 3
    engine._sessions[node_id("b")].run_round = lambda *_: Refusal("unavailable")
    pushed = engine.push_messages(orders(engine, attempt=2))
    assert [len(engine.wait(pushed, 0.0)) for _ in range(2)] == [2, 3], "what the clock says decides no backup"


def test_replies_come_in_the_order_asked_and_again_until_they_are_cancelled(engine):
    pushed = engine.push_messages(orders(engine))
    while len(engine.wait(pushed, 0.0)) < 3:
        pass
    replies = list(engine.pull_messages([pushed[2], pushed[0]]))
    assert [engine.name_of(r.metadata.src_node_id) for r in replies] == ["c", "a"]
    assert [r.metadata.reply_to_message_id for r in replies] == [pushed[2], pushed[0]]
    engine.cancel(pushed[:1])
    assert [engine.name_of(r.metadata.src_node_id) for r in engine.pull_messages(pushed)] == ["b", "c"]
    engine.cancel(pushed)
    assert list(engine.pull_messages(pushed)) == []


def test_replies_that_nobody_holds_any_more_are_forgotten(engine):
    replies = engine.send_and_receive(orders(engine))
    assert len(list(replies)) == len(list(replies)) == 3 and len(engine._orders) == 3
    del replies
    assert not engine._orders and not engine._uploads._waiting


def test_a_reply_from_the_store_is_what_the_client_sent(engine):
    layout, [message] = layout_of("lora"), orders(engine, "a")
    plan = RoundPlan(plan_of("fedavg-lora", run_id="0" * 16), 1, 0, "0" * 64)
    sent = LinearSession("a", layout).run_round(plan, start_of(layout, 0))
    [reply] = engine.send_and_receive([message])
    got = read_reply(reply)
    assert (got.steps, got.num_examples, got.train_loss) == (sent.steps, sent.num_examples, sent.train_loss)
    assert all(np.array_equal(got.tensors[name], sent.tensors[name]) for name in sent.tensors)


def test_replies_keep_their_values_and_the_store_begins_anew_when_none_waits(engine):
    def ask(names, attempt):
        pushed = engine.push_messages(orders(engine, names, attempt))
        while len(engine.wait(pushed, 0.0)) < len(names):
            pass
        return pushed

    a, b, c = ask("abc", 0)
    first = list(engine.pull_messages([b]))
    engine.cancel([b, c])
    [left] = ask("c", 1)  # beside that of a, which still waits
    kept = {name: array.copy() for name, array in read_reply(first[0]).tensors.items()}
    engine.cancel([a])
    [second] = engine.pull_messages([left])
    engine.cancel([left])
    old = engine._uploads._file
    again = list(engine.pull_messages(ask("abc", 2)))
    assert old.closed and not engine._uploads._file.closed and len(again) == 3
    values = [read_reply(reply).tensors for reply in (*first, second)]
    assert all(np.array_equal(values[0][name], kept[name]) for name in kept)
    plan = RoundPlan(plan_of("fedavg-lora", run_id="0" * 16), 1, 1, "0" * 64)
    sent = LinearSession("c", layout_of("lora")).run_round(plan, start_of(layout_of("lora"), 0))
    assert all(np.array_equal(values[1][name], sent.tensors[name]) for name in sent.tensors)


@pytest.mark.parametrize(("wire_dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_those_of_the_values_in_the_wire_dtype(wire_dtype, width):
    layout, plan = layout_of("lora"), plan_of("fedavg-lora", run_id="0" * 16, wire_dtype=wire_dtype)
    engine = InProcessEngine({"a": LinearSession("a", layout)}, "0" * 16, layout)
    arrays = to_record(start_of(layout, 0), wire_dtype)
    list(engine.send_and_receive([train_message(RoundPlan(plan, 1, 0, "0" * 64), arrays, node_id("a"))]))
    assert engine.bytes_up == engine.bytes_down == width * layout.num_trained
    engine.close("the test is over")


def test_only_orders_are_carried(engine):
    [message] = orders(engine, "a")
    message.content["more"] = message.content["config"]
    with pytest.raises(ValueError, match="exactly one"):
        engine.push_messages([message])
    [stranger] = orders(engine, "x")
    with pytest.raises(ValueError, match="ever joined"):
        engine.push_messages([stranger])


def test_a_client_that_leaves_is_lost_until_it_comes_back(engine):
    layout, pushed = layout_of("lora"), engine.push_messages(orders(engine, "ab"))
    engine.leave("b")
    assert engine.wait(pushed, 0.0) == {pushed[0]: "uploaded", pushed[1]: "lost"}
    assert [engine.name_of(node) for node in engine.idle()] == ["a", "c"]
    assert engine.wait(pushed, 0.0)[pushed[1]] == "lost"
    engine.join("b", LinearSession("b", layout))
    assert engine.wait(pushed, 0.0) == dict.fromkeys(pushed, "uploaded")
    engine.leave("c")
    [late] = engine.push_messages(orders(engine, "c"))
    assert engine.wait([late], 0.0) == {late: "lost"}
    assert list(engine.send_and_receive(orders(engine, "c"))) == []


def test_a_cancelled_order_is_forgotten(engine):
    pushed = engine.push_messages(orders(engine))
    engine.wait(pushed, 0.0)
    engine.cancel(pushed)
    assert engine.wait(pushed, 0.0) == {} and list(engine.pull_messages(pushed)) == [] and len(engine.idle()) == 3


def test_an_upload_that_does_not_fit_becomes_a_refusal(engine):
    class Wrong(LinearSession):
        def run_round(self, plan, tensors):
            upload = super().run_round(plan, tensors)
            upload.tensors["head.out.bias"] = np.zeros(4, np.float32)
            return upload

    engine.join("a", Wrong("a", layout_of("lora")))
    [pushed] = engine.push_messages(orders(engine, "a"))
    outcome = engine.wait([pushed], 0.0)[pushed]
    assert isinstance(outcome, Refusal) and outcome.code == "invalid-tensors" and "(4,)" in outcome.detail
    assert read_reply(next(engine.pull_messages([pushed]))) == outcome


def test_an_exception_of_a_client_reaches_the_researcher(engine):
    class Failing(LinearSession):
        def run_round(self, plan, tensors):
            raise ZeroDivisionError

    engine.join("a", Failing("a", layout_of("lora")))
    pushed = engine.push_messages(orders(engine, "a"))
    with pytest.raises(ZeroDivisionError):
        engine.wait(pushed, 0.0)
