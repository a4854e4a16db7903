"""The server's places: streams that are not ready lose theirs, and names of strangers do not fill its memory."""

import json
import os
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

import fedlora
from fedlora import wire
from fedlora.plan import PROTOCOL, Proposal, Refusal, Refused
from fedlora.wire import pb
from fedlora_client.connection import Connection, ServerUnreachable
from fedlora_client.state import FolderState
from fedlora_server.client_registry import ClientRegistry
from fedlora_server.engine import node_id
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.label_sets import FEW
from fedlora_server.names import Names
from fedlora_server.seats import MOST_AWAY, MOST_LABELS_HELD
from tests.federation import plan_of
from tests.processes import PATIENCE
from tests.server.federated_clients import KeptSecrets
from tests.server.test_client_registry import Line, order
from tests.server.test_grpc_hostile import KEY, READY, converse, join_frame

RUN = plan_of("ffa-lora")
PLACES = 4


@pytest.fixture
def listen(tmp_path):
    running = []

    def listen(**options):
        running.append(GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path / "uploads", **options))
        return running[-1]

    yield listen
    for engine in running:
        engine.close("the test is over")


class Sitting:
    """A client that joins under its own name, sends the given frames, and then nothing."""

    def __init__(self, engine, name, *frames):
        self._done = threading.Event()
        self._channel = grpc.insecure_channel(engine.address, options=wire.CHANNEL_OPTIONS)
        join = join_frame(name, process=os.urandom(16)).SerializeToString()
        self.call = self._channel.stream_stream(wire.SERVICE)(self._requests(join, *frames))
        assert pb.ServerFrame.FromString(next(self.call)).HasField("welcome")

    def _requests(self, *frames) -> Iterator[bytes]:
        yield from frames
        self._done.wait()

    def leave(self):
        self._done.set()
        self._channel.close()


def wait_until(true, engine):
    deadline = time.monotonic() + 10 * PATIENCE
    while not true():
        assert time.monotonic() < deadline
        engine.wait([], 0.02)


def test_an_honest_client_gets_in_while_others_join_and_are_not_ready(listen):
    """They are five times as many as the places. Ready clients stay; a stream that loses its place is told why."""
    engine = listen(max_clients=PLACES)
    north = Connection(engine.address, "north", private=False)
    north.join()
    north.ready()
    wait_until(engine.get_node_ids, engine)
    sitting = [Sitting(engine, f"sitting {number}") for number in range(5 * PLACES)]
    south = Connection(engine.address, "south", private=False)
    south.join()
    south.ready()
    wait_until(lambda: len(engine.get_node_ids()) == 2, engine)
    with pytest.raises(grpc.RpcError) as ended:
        next(sitting[0].call)
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "place was needed" in ended.value.details()
    wait_until(lambda: sum(member.connected for member in engine.members()) <= PLACES, engine)
    assert [member.name for member in engine.members()][:2] == ["north", "south"]
    for one in (north, south, *sitting):
        one.leave()


def test_while_all_places_are_those_of_ready_clients_the_next_one_is_told_so(listen):
    engine = listen(max_clients=PLACES)
    sitting = [Sitting(engine, f"client {number}", READY) for number in range(PLACES)]
    wait_until(lambda: len(engine.get_node_ids()) == PLACES, engine)
    with pytest.raises(ServerUnreachable, match=f"{PLACES} clients that are ready"):
        Connection(engine.address, "late", private=False, connect_timeout_s=1.0).join()
    assert len(engine.get_node_ids()) == PLACES
    for one in sitting:
        one.leave()


def test_ready_clients_that_were_never_asked_keep_out_nobody_who_shows_a_secret_of_the_run(listen, tmp_path):
    engine, state = listen(max_clients=PLACES), FolderState(tmp_path / "state")
    north = Connection(engine.address, "north", private=False, secrets=state)
    north.join()
    north.ready()
    wait_until(engine.get_node_ids, engine)
    north.leave()
    wait_until(lambda: not engine.get_node_ids(), engine)
    sitting = [Sitting(engine, f"client {number}", READY) for number in range(PLACES)]
    wait_until(lambda: len(engine.get_node_ids()) == PLACES, engine)
    north = Connection(engine.address, "north", private=False, secrets=state)
    north.join()
    north.ready()
    wait_until(lambda: node_id("north") in engine.get_node_ids(), engine)
    with pytest.raises(grpc.RpcError) as ended:
        next(sitting[-1].call)
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "place was needed" in ended.value.details()
    assert len(engine.get_node_ids()) == PLACES
    for one in (north, *sitting):
        one.leave()


def test_streams_that_wait_at_the_door_and_say_nothing_keep_out_nobody_who_is_known(listen):
    engine = listen(max_clients=PLACES)
    secrets = KeptSecrets()
    for place in (1, 2):
        north = Connection(engine.address, "north", private=False, secrets=secrets)
        north.join()
        north.ready()
        wait_until(lambda: node_id("north") in engine.get_node_ids(), engine)
        if place == 2:
            break
        north.leave()
        wait_until(lambda: not engine.get_node_ids(), engine)
        sitting = [Sitting(engine, f"client {number}", READY) for number in range(PLACES)]
        wait_until(lambda: len(engine.get_node_ids()) == PLACES, engine)
        channels = [grpc.insecure_channel(engine.address, options=wire.CHANNEL_OPTIONS) for _ in range(100)]
        done = threading.Event()
        silent = [channel.stream_stream(wire.SERVICE)(iter(done.wait, True)) for channel in channels]
    done.set()
    for channel in channels:
        channel.close()
    assert silent
    for one in (north, *sitting):
        one.leave()


def test_a_client_that_takes_longer_than_it_may_to_become_ready_joins_again_and_is_ready_then(listen):
    engine, said = listen(ready_within_s=0.5), []
    north = Connection(engine.address, "north", private=False, report=said.append)
    north.join()
    wait_until(lambda: any("not ready within 0.5 s" in line for line in said), engine)
    north.ready()
    wait_until(engine.get_node_ids, engine)
    time.sleep(1.5)
    assert engine.get_node_ids() == [node_id("north")], "one that is ready has all the time it needs"
    north.leave()


def test_whoever_declines_to_take_part_has_nothing_more_to_say(listen):
    events = []
    engine = listen(notify=events.append)
    declined = pb.ClientFrame(declined=pb.Declined(refusal=wire.refusal_to_wire(Refusal("policy"))))
    join = join_frame("mallory").SerializeToString()
    _, status = converse(engine.address, [join, *[declined.SerializeToString()] * 100])
    assert status == grpc.StatusCode.OK
    wait_until(lambda: events[-1].kind == "left", engine)
    assert [event.kind for event in events] == ["joined", "declined", "left"]


def test_answers_to_what_nobody_asked_end_a_stream_after_a_few(listen):
    engine = listen()
    declined = pb.ClientFrame(declined=pb.Declined(key=KEY, refusal=wire.refusal_to_wire(Refusal("policy"))))
    heard, status = converse(engine.address, [join_frame("mallory").SerializeToString(), READY,
                                              *[declined.SerializeToString()] * 500])
    assert status == grpc.StatusCode.INVALID_ARGUMENT and len(heard) < 100


def joined(registry, name):
    line = Line()
    registry.join(line, pb.Join(protocol=PROTOCOL, schema=wire.SCHEMA, fedlora_version=fedlora.__version__, name=name,
                                process=os.urandom(16), private=True))
    return line


def test_names_that_come_and_go_are_forgotten_and_their_bytes_are_not():
    registry = ClientRegistry(Proposal(RUN), lambda event: None)
    for number in range(5000):
        line = joined(registry, f"client {number}")
        registry.count(line, up=3, down=5)
        registry.gone(line)
    assert registry.members() == [] and registry.moved() == (15000, 25000)


def test_of_names_that_are_away_and_were_never_asked_those_are_remembered_that_were_ready_for_longest(tmp_path):
    names = Names(tmp_path / "names")
    names.begin()
    registry = ClientRegistry(Proposal(RUN), lambda event: None, names=names)

    def come_and_go(name, ready_s=0.0):
        line = joined(registry, name)
        assert registry.ready(line, (), None)
        if ready_s or name.endswith("00"):
            names.keep(name, os.urandom(32))
        time.sleep(ready_s)
        registry.gone(line)

    come_and_go("north", ready_s=0.2)
    for number in range(MOST_AWAY + 500):
        come_and_go(f"name {number}")
    remembered = {member.name for member in registry.members()}
    assert len(remembered) == MOST_AWAY and "north" in remembered
    assert not names.may_have("north", b"")
    assert {json.loads(path.read_text())["name"] for path in (tmp_path / "names").iterdir()} <= remembered


def test_a_client_that_was_named_as_idle_and_is_forgotten_before_it_is_asked_is_lost():
    registry = ClientRegistry(Proposal(RUN), lambda event: None, names=Names(None))
    north = joined(registry, "north")
    registry.ready(north, (), None)
    registry.count(north, up=3, down=5)
    [node] = registry.nodes(idle=True)
    registry.gone(north)
    for number in range(MOST_AWAY + 10):
        line = joined(registry, f"name {number}")
        registry.ready(line, (), None)
        time.sleep(1e-4)
        registry.gone(line)
    assert "north" not in {member.name for member in registry.members()}
    assert registry.name_of(node) == "north" and registry.moved() == (3, 5)
    registry.push([order(1)])
    assert registry.wait(["1/0"], 0.0) == {"1/0": "lost"}
    assert registry.name_of(node) == "north" and registry.moved() == (3, 5)


LONG = tuple(f"label {number}" for number in range(999))


def announces(registry, name, labels):
    line = joined(registry, name)
    registry.ready(line, labels, None)
    return line


def test_a_line_about_label_names_does_not_grow_with_them():
    events = []
    registry = ClientRegistry(Proposal(RUN.with_open_labels()), events.append)
    announces(registry, "north", LONG)
    assert events[-1].detail == "discloses 999 label names: label 0, label 1, label 2, …"
    announces(registry, "south", ("no", "yes"))
    assert events[-1].detail == "discloses its label names no, yes"


def test_of_label_names_a_bounded_number_is_held_and_few_are_taken_from_anybody():
    registry = ClientRegistry(Proposal(RUN.with_open_labels()), lambda event: None)
    with pytest.raises(Refused, match="--labels"):
        for number in range(MOST_LABELS_HELD // len(LONG) + 1):
            last = announces(registry, f"name {number}", tuple(f"{number} {label}" for label in LONG))
    announces(registry, "north", ("no", "yes"))
    held = sum(len(member.announced_labels) for member in registry.members())
    registry.gone(last)
    assert held <= MOST_LABELS_HELD and held - sum(
        len(member.announced_labels) for member in registry.members()) == len(LONG) - FEW
    registry.fix_labels(("no", "yes"))
    assert max(len(member.announced_labels) for member in registry.members()) == FEW
    assert {member.name: member.announced_labels for member in registry.members()}["north"] == ("no", "yes")
