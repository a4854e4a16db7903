"""The server keeps the last anchor of each name, whatever happens to uploads and runs."""

import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedlora import wire
from fedlora.plan import ANCHOR_BYTES, Proposal, RoundPlan, Upload
from fedlora.wire import pb
from fedlora_client.connection import Connection
from fedlora_server.anchors import Anchors
from fedlora_server.engine import node_id
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import reply, to_record, train_message
from tests.federation import layout_of, plan_of, start_of
from tests.server.federated_clients import KeptSecrets
from tests.server.test_grpc_hostile import READY, converse, join_frame

LAYOUT = layout_of("frozen-a")
STATE = start_of(LAYOUT, seed=1)
UPLOAD = {spec.name: STATE[spec.name] for spec in LAYOUT.trained}


def anchor(byte: int) -> bytes:
    return bytes([byte]) * ANCHOR_BYTES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "fedlora" / "anchors.sqlite"


def test_the_newest_of_each_name_is_kept_over_servers(path):
    first, second = Anchors(path), Anchors(path)
    assert first.newest("north") == b"" and not path.parent.exists(), "nothing is made for nothing"
    for name, byte in (("north", 1), ("south", 2), ("north", 3)):
        first.keep(name, anchor(byte))
    assert [second.newest(name) for name in ("north", "south", "west")] == [anchor(3), anchor(2), b""]
    second.keep("south", anchor(4))
    assert first.newest("south") == anchor(4)
    first.close()
    second.close()
    assert Anchors(path).newest("north") == anchor(3)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_servers_and_threads_keep_at_once(path):
    servers = [Anchors(path) for _ in range(3)]

    def keep(index):
        for byte in range(30):
            servers[index % 3].keep(f"client-{index}", anchor(byte))

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(keep, range(12)))
    assert [servers[0].newest(f"client-{index}") for index in range(12)] == [anchor(29)] * 12
    for server in servers:
        server.close()


def test_without_a_place_they_last_as_long_as_the_server():
    anchors = Anchors(None)
    anchors.keep("north", anchor(1))
    assert anchors.newest("north") == anchor(1)


@pytest.mark.parametrize("spoil", ["no folder", "no database"])
def test_a_file_that_cannot_be_used_is_one_warning_and_the_run_goes_on(path, caplog, spoil):
    if spoil == "no folder":
        path.parent.parent.write_text("a file where a folder should be")
    else:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"this is no database at all" * 100)
    anchors = Anchors(path)
    with caplog.at_level(logging.WARNING):
        for byte in (1, 2):
            anchors.keep("north", anchor(byte))
            assert anchors.newest("north") == anchor(byte) and anchors.newest("south") == b""
    assert [record.message for record in caplog.records if str(path) in record.message] == [caplog.records[0].message]


class Server:
    """One run's server with a file for anchors, and the client north, to which a test gives orders by hand."""

    def __init__(self, folder, anchors, run_id):
        self.run = plan_of("ffa-lora", run_id=run_id)
        self.engine = GrpcEngine("127.0.0.1:0", Proposal(self.run), folder / run_id, anchors=anchors)
        self.engine.expect(LAYOUT)
        self.secrets = KeptSecrets()

    def join(self, name="north"):
        self.client = Connection(self.engine.address, name, private=False, connect_timeout_s=10, secrets=self.secrets)
        return self.client.join()

    def ask(self, round, sealed):
        """Have the client answer an order with this anchor, and return the message that the strategy gets."""
        node = node_id(self.client.name)
        while node not in self.engine.idle():
            self.engine.wait([], 0.05)
        plan = RoundPlan(self.run, round, 0, wire.tensors_digest({}))
        [sent] = self.engine.push_messages([train_message(plan, to_record(STATE), node)])
        got, _ = self.client.next_request()
        upload = Upload(*got.key, tensors=UPLOAD, steps=1, num_examples=10, anchor=sealed)
        assert self.client.send(upload) is None
        while sent not in self.engine.wait([sent], 0.05):
            pass
        [message] = self.engine.pull_messages([sent])
        return message

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.client.leave()
        self.engine.close("the test is over")


def test_a_name_is_given_its_last_anchor_back_in_every_later_run(tmp_path, path):
    with Server(tmp_path, path, "a" * 16) as first:
        assert first.join().anchor == b"", "a server over gRPC keeps anchors, and says so"
        first.client.ready()
        first.ask(1, anchor(1))
        first.ask(2, anchor(2))
    with Server(tmp_path, path, "b" * 16) as second:
        assert second.join().anchor == anchor(2)
        second.client.ready()
        second.ask(1, b"")
        second.client.leave()
        assert second.join().anchor == anchor(2), "an upload without one takes none away"
        second.client.leave()
        assert second.join("south").anchor == b""


@pytest.mark.parametrize("tensors", [UPLOAD, {"head.out.bias": np.zeros(4, np.float32)}], ids=["late", "unfit"])
def test_an_upload_that_is_refused_leaves_its_anchor_all_the_same(tmp_path, path, tensors):
    """Nobody asked for the upload: the server gave up the round, or an earlier server had asked."""
    with Server(tmp_path, path, "a" * 16) as server:
        upload = wire.upload_to_wire(Upload("a" * 16, 1, 0, tensors, steps=1, anchor=anchor(7)))
        head = pb.ClientFrame(upload=upload).SerializeToString()
        heard, _ = converse(server.engine.address, [
            join_frame("north").SerializeToString(), READY, *wire.transfer_frames(head, tensors)])
        assert heard[-1].ack.HasField("refusal") and heard[0].welcome.anchor == b""
        server.secrets["north"] = heard[0].welcome.secret
        assert server.join().anchor == anchor(7)


def test_no_strategy_sees_an_anchor(tmp_path, path):
    sealed = bytes(range(100, 100 + ANCHOR_BYTES))
    with Server(tmp_path, path, "a" * 16) as server:
        server.join()
        server.client.ready()
        message = server.ask(1, sealed)
    order = train_message(RoundPlan(server.run, 1, 0, wire.tensors_digest({})), to_record(STATE), node_id("north"))
    made = reply(Upload(server.run.run_id, 1, 0, UPLOAD, steps=1, num_examples=10, anchor=sealed), order)
    for seen in (message, made):
        assert set(seen.content["config"]) == {"run_id", "round", "attempt"}
        assert set(seen.content["metrics"]) == {"steps", "num_examples"} and set(seen.content["arrays"]) == set(UPLOAD)
    assert sealed not in b"".join(file.read_bytes() for file in tmp_path.rglob("*")
                                  if file.is_file() and path.parent not in file.parents)


def test_a_stream_that_comes_back_with_a_newer_anchor_is_the_same_run(tmp_path, path):
    """Its Welcome differs from the one before only in the anchor."""
    with Server(tmp_path, path, "a" * 16) as server:
        server.join()
        server.client.ready()
        server.ask(1, anchor(1))
        [session] = server.engine._sessions
        session._context.cancel()
        server.ask(2, anchor(2))
        assert server.engine._anchors.newest("north") == anchor(2)
