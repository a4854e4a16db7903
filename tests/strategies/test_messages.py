"""Flower messages carry exactly the contents of the plan and of the upload."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict

from fedlora.plan import REFUSALS, Refusal, RoundPlan, Upload
from fedlora.wire import packed
from fedlora_client import flower_app
from fedlora_strategies import messages
from tests.federation import plan_of


@pytest.fixture(autouse=True)
def identity():
    messages.assume_identity("0123456789abcdef")


def order(**changes):
    plan = RoundPlan(plan_of("fed-sb", **changes), 2, 1, "ab" * 32)
    message = messages.train_message(plan, messages.to_record({"q.R": np.eye(2, dtype=np.float32)}), 7)
    messages.assign_id(message, "m1")
    return plan, message


def upload(**figures):
    return Upload("0123456789abcdef", 2, 1, {"q.R": np.ones((2, 2), np.float32)}, steps=4, **figures)


def same(one, other):
    fields = (dict(vars(value)) for value in (one, other))
    (a, left), (b, right) = ((f.pop("tensors"), f) for f in fields)
    return left == right and a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changes", [{}, dict(task="causal-lm", labels=(), train_head=False), dict(private=True)])
def test_an_order_survives_the_message(changes):
    plan, message = order(**changes)
    [(same, read, arrays)] = messages.read_train_messages([message])
    assert same is message and read == plan and message.metadata.dst_node_id == 7
    np.testing.assert_array_equal(arrays["q.R"], np.eye(2))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_record_is_what_flower_makes_of_the_arrays(dtype):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a": np.zeros(4, np.float32)}
    made, flowers = messages.to_record(tensors, dtype), ArrayRecord(
        {name: Array(np.asarray(array, order="C")) for name, array in packed(tensors, dtype).items()})
    assert made == flowers and list(made) == list(flowers)
    assert made.object_id == flowers.object_id


@pytest.mark.parametrize("figures", [{}, dict(delta=1e-5, noise_multiplier=1.2), dict(num_examples=9, train_loss=0.5)])
def test_an_upload_survives_the_message(figures):
    _, message = order()
    assert same(messages.read_reply(messages.reply(upload(**figures), message)), upload(**figures))


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_survives_the_message(code):
    _, message = order()
    for refusal in (Refusal(code), Refusal(code, "a: b")):
        assert messages.read_reply(messages.reply(refusal, message)) == refusal


def test_an_error_that_is_no_refusal_reads_as_unavailable_and_its_text_is_dropped():
    _, message = order()
    for code in (2, messages.REFUSED):
        assert messages.read_reply(Message(Error(code, "text: row"), reply_to=message)) == Refusal("unavailable")


class Answering:
    def __init__(self, answer):
        self.answer = answer

    def run_round(self, plan, tensors):
        self.seen = plan, tensors
        return self.answer() if callable(self.answer) else self.answer


@pytest.mark.parametrize("answer", [upload(num_examples=9), upload(delta=1e-5), Refusal("policy"),
                                    Refusal("missing-tensors", "x")])
def test_the_client_app_reads_and_writes_the_same_messages(answer):
    plan, message = order()
    session = Answering(answer)
    mine, its = messages.reply(answer, message), flower_app.train(message, session)
    assert session.seen[0] == plan and list(session.seen[1]) == ["q.R"]
    if isinstance(answer, Refusal):
        assert mine.error == its.error
    else:
        assert mine.content == its.content
    assert its.metadata.reply_to_message_id == "m1" and its.metadata.src_node_id == 7


def test_the_text_of_a_clients_exception_stays_with_the_client(caplog):
    def fail():
        raise RuntimeError("row 7: Jane Doe, diabetes")

    app = flower_app.client_app(lambda context: Answering(fail))
    _, message = order()
    answer = app(message, Context(1, 7, {}, RecordDict(), {}))
    assert "Jane" not in repr(answer) and messages.read_reply(answer) == Refusal("unavailable")
    assert "Jane" in caplog.text


def broken_reply(message, change):
    answer = messages.reply(upload(), message)
    change(answer.content)
    return answer


@pytest.mark.parametrize("change", [
    lambda c: c.pop("metrics"),
    lambda c: c.update(more=MetricRecord({"steps": 1})),
    lambda c: c["metrics"].update(batch_size=3),
    lambda c: c["metrics"].pop("steps"),
    lambda c: c["metrics"].update(steps=4.0),
    lambda c: c["metrics"].update(delta=[1e-5]),
    lambda c: c["config"].update(code="import os"),
    lambda c: c["config"].update(round="2"),
    lambda c: setattr(c["arrays"]["q.R"], "data", b"\x80\x04pickle"),
    lambda c: setattr(c["arrays"]["q.R"], "stype", "torch"),
])
def test_a_reply_with_anything_else_in_it_is_refused(change):
    _, message = order()
    with pytest.raises(ValueError):
        messages.read_reply(broken_reply(message, change))


@pytest.mark.parametrize("change", [
    lambda c: c.pop("config"),
    lambda c: c.update(metrics=MetricRecord({"x": 1})),
    lambda c: c["config"].update(code="import os"),
    lambda c: c["config"].pop("lr"),
])
def test_an_order_with_anything_else_in_it_is_refused_on_both_sides(change):
    _, message = order()
    change(message.content)
    with pytest.raises(ValueError):
        list(messages.read_train_messages([message]))
    with pytest.raises(ValueError):
        flower_app.train(message, Answering(upload()))
