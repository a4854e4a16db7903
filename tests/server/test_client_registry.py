"""The registry's treatment of clients that still work for an earlier server of the run."""

from types import SimpleNamespace

import pytest

import fedlora
from fedlora.plan import PROTOCOL, Proposal, Refusal, Refused
from fedlora.wire import SCHEMA, pb
from fedlora_server.client_registry import ClientRegistry, Unasked
from fedlora_server.engine import node_id
from fedlora_server.seats import ROUNDS_KNOWN, PendingRequest
from fedlora_server.upload_store import Stored
from tests.federation import plan_of

RUN = plan_of("ffa-lora")
NODE = node_id("north")


class Line:
    """A client's stream that records what is sent over it."""

    def __init__(self):
        self.name, self.process, self.secret, self.said = "", b"", b"", []
        self.came_from = self.fingerprint = ""

    def ask(self, order):
        self.said.append(("task", order.plan.key))

    def cancel(self, key):
        self.said.append(("cancel", key))

    def close(self, why=None):
        self.said.append(("close",))


def key(round, attempt=0):
    return RUN.run_id, round, attempt


def order(round, attempt=0):
    return PendingRequest(f"{round}/{attempt}", None, NODE, SimpleNamespace(key=key(round, attempt), round=round,
                                                                   attempt=attempt), {})


def back(working, *, under_way=3):
    """Return the registry of a resumed run, and the stream of north, which still works for the earlier server."""
    registry, line = ClientRegistry(Proposal(RUN), lambda event: None, under_way=under_way), Line()
    registry.join(line, pb.Join(protocol=PROTOCOL, schema=SCHEMA, fedlora_version=fedlora.__version__, name="north",
                              process=b"n" * 16, private=True))
    registry.ready(line, (), working)
    return registry, line


def test_a_client_at_work_for_the_open_round_goes_on_and_counts_as_idle(tmp_path):
    registry, line = back(key(3))
    assert line.said == [] and registry.nodes(idle=True) == [NODE]
    registry.push([order(3)])
    assert line.said == [] and registry.nodes(idle=True) == [], "it has in hand what it is asked for"
    assert registry.expected(line, key(3)) is not None
    assert registry.answered(line, key(3), Stored(tmp_path / "upload", {}, "fp32", {})) is None
    assert registry.wait(["3/0"], 0.0) == {"3/0": "uploaded"}


@pytest.mark.parametrize(("working", "under_way"), [(key(2), 3), (key(3), None)])
def test_a_client_at_work_for_anything_else_is_told_to_stop(working, under_way):
    registry, line = back(working, under_way=under_way)
    assert line.said == [("cancel", working)] and registry.nodes(idle=True) == []


def test_a_straggler_of_the_open_round_is_not_idle_once_the_round_is_over():
    registry, line = back(key(3))
    registry.push([order(3)])
    registry.cancel(["3/0"])
    assert line.said == [("cancel", key(3))] and registry.nodes(idle=True) == []


def test_an_answer_is_acknowledged_before_the_next_order_is_sent():
    registry, line = back(key(3, 1))
    registry.push([order(3)])
    assert line.said == [], "its hands are full"
    late = registry.answered(line, key(3, 1), Refusal("unavailable"), lambda late: line.said.append(("ack", late)))
    assert late is not None and late.code == "too-late"
    assert line.said == [("ack", late), ("task", key(3))]


def test_a_long_run_remembers_only_the_last_rounds_of_a_client_and_still_asks_nobody_twice(tmp_path):
    registry, line = back(None)
    for number in range(1, 41):
        registry.push([order(number)])
        registry.answered(line, key(number), Stored(tmp_path / "upload", {}, "fp32", {}))
        registry.take(f"{number}/0")
    seat = registry._seats.recall(NODE)
    assert len(seat.asked) == ROUNDS_KNOWN and not seat.orders
    for number in (1, 20, 40):
        with pytest.raises(ValueError, match="was asked for round"):
            registry.push([order(number)])
        if number < 40:
            with pytest.raises(Refused) as late:
                registry.expected(line, key(number))
            assert not isinstance(late.value, Unasked)
    with pytest.raises(Unasked):
        registry.expected(line, key(41))
