"""A peer may send anything: the other side answers with a typed error, goes on, and uses none of it."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedlora
from fedlora import wire
from fedlora.plan import PROTOCOL, Proposal, Refused, RoundPlan, Upload
from fedlora.wire import WireError, pb
from fedlora_client.connection import Connection, Goodbye, RunChanged, ServerUnreachable
from fedlora_server.engine import node_id
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import to_record, train_message
from tests.federation import layout_of, plan_of, start_of

RUN = plan_of("ffa-lora")
LAYOUT = layout_of("frozen-a")
STATE = start_of(LAYOUT, seed=1)
UPLOAD = {spec.name: STATE[spec.name] for spec in LAYOUT.trained}
KEY = pb.Key(round=1, attempt=0)
REQUEST = wire.request_to_wire(RoundPlan(RUN, 1, 0, wire.tensors_digest({})), wire.shapes_of(STATE))


def join_frame(name: str = "mallory", **changes) -> pb.ClientFrame:
    fields = dict(protocol=PROTOCOL, schema=wire.SCHEMA, fedlora_version=fedlora.__version__, name=name,
                  process=bytes(16), private=False)
    return pb.ClientFrame(join=pb.Join(**(fields | changes)))


def welcome_frame(secret: bytes = bytes(wire.SECRET_BYTES)) -> bytes:
    welcome = wire.proposal_to_wire(Proposal(RUN))
    welcome.secret = secret
    return pb.ServerFrame(welcome=welcome).SerializeToString()


def upload_frames(tensors=UPLOAD) -> list[bytes]:
    return list(wire.transfer_frames(upload_head(tensors), tensors))


def upload_head(tensors=UPLOAD) -> bytes:
    upload = wire.upload_to_wire(Upload(RUN.run_id, 1, 0, tensors, steps=1))
    return pb.ClientFrame(upload=upload).SerializeToString()


def converse(address: str, frames: list[bytes]) -> tuple[list[pb.ServerFrame], grpc.StatusCode]:
    """Send the frames, and return all frames until the server is silent for a moment or ends the stream."""
    heard: list[pb.ServerFrame] = []
    done = threading.Event()

    def requests() -> Iterator[bytes]:
        yield from frames
        done.wait(0.3)

    with grpc.insecure_channel(address) as channel:
        call = channel.stream_stream(wire.SERVICE)(requests(), timeout=5)
        try:
            for data in call:
                heard.append(pb.ServerFrame.FromString(data))
            return heard, grpc.StatusCode.OK
        except grpc.RpcError as error:
            return heard, error.code()
        finally:
            done.set()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = GrpcEngine("127.0.0.1:0", Proposal(RUN), tmp_path_factory.mktemp("uploads"))
    engine.expect(LAYOUT)
    yield engine
    engine.close("done")


def assert_still_works(engine: GrpcEngine, number: int) -> None:
    """Check that an honest client can still do a round."""
    honest = Connection(engine.address, "honest", private=False)
    honest.join()
    honest.ready()
    while node_id("honest") not in engine.idle():
        engine.wait([], 0.1)
    order = RoundPlan(RUN, number, 0, wire.tensors_digest({}))
    [sent] = engine.push_messages([train_message(order, to_record(STATE), node_id("honest"))])
    plan, tensors = honest.next_request()
    assert all(np.array_equal(tensors[name], STATE[name]) for name in STATE)
    assert honest.send(Upload(*plan.key, tensors=UPLOAD, steps=1)) is None
    assert engine.wait([sent], 5.0) == {sent: "uploaded"}
    engine.cancel([sent])
    honest.leave()
    while node_id("honest") in engine.get_node_ids():
        engine.wait([], 0.1)


READY = pb.ClientFrame(ready=pb.Ready()).SerializeToString()
JOIN = join_frame().SerializeToString()
END = pb.ClientFrame(end=pb.End()).SerializeToString()
CHUNK = pb.ClientFrame(chunk=pb.Chunk(data=bytes(64))).SerializeToString()
EARLY = pb.ClientFrame(chunk=pb.Chunk(data=bytes(4), checksum=0)).SerializeToString()
LONG = pb.ClientFrame(chunk=pb.Chunk(data=bytes(1 << 20))).SerializeToString()
UNKNOWN = b"\xa0\x06\x01"
"""The bytes of a field 100, which no message has. Appended to a message, they become its field."""


def with_unknown_inside(number: int, message: Message) -> bytes:
    """Return a frame in whose n-th message there is a field that this version does not know."""
    inside = message.SerializeToString() + UNKNOWN
    assert len(inside) < 1 << 14
    return bytes([number << 3 | 2, len(inside) & 0x7F | 0x80, len(inside) >> 7]) + inside


@pytest.mark.parametrize("frames", [
    [b"\xff\xff\xff"], [b""], [READY], [CHUNK], [END], [JOIN, JOIN], [JOIN, CHUNK], [JOIN, READY, END],
    [JOIN, READY, upload_head(), READY], [JOIN, READY, *upload_frames(), CHUNK],
    [JOIN, READY, upload_head(), b"\x22\x05\x0a\x03abc"], [JOIN, READY, CHUNK + END],
    [JOIN, READY, upload_head(), CHUNK + CHUNK + READY],
    [join_frame("").SerializeToString()], [join_frame("\x1b[2J").SerializeToString()],
    [join_frame("x" * 65).SerializeToString()], [join_frame(process=b"short").SerializeToString()],
    [JOIN, pb.ClientFrame(ready=pb.Ready(labels=["a"])).SerializeToString()], [JOIN, READY, READY],
    [JOIN, pb.ClientFrame(ready=pb.Ready(labels=map(str, range(1001)))).SerializeToString()],
    [JOIN, pb.ClientFrame(declined=pb.Declined(refusal=pb.Refusal(code="rm -rf"))).SerializeToString()],
    [with_unknown_inside(1, join_frame().join)], [JOIN + UNKNOWN], [JOIN, with_unknown_inside(2, pb.Ready())],
    [JOIN, READY, with_unknown_inside(3, pb.Upload(key=KEY, steps=1))], [JOIN, READY, upload_head() + UNKNOWN],
    [JOIN, READY, upload_head(), CHUNK[:1] + bytes([CHUNK[1] + len(UNKNOWN)]) + CHUNK[2:] + UNKNOWN],
    [JOIN, READY, pb.ClientFrame(upload=pb.Upload(key=KEY, anchor=bytes(67))).SerializeToString()],
    [JOIN, READY, pb.ClientFrame(sum=pb.SumAnswer(roster=bytes(32))).SerializeToString()],  # the run has no secure sums
    [JOIN, pb.ClientFrame(ready=pb.Ready(membership=pb.Membership(noise=1))).SerializeToString()],
], ids=range(30))
def test_a_client_that_breaks_the_protocol_loses_its_stream(engine, frames):
    _, status = converse(engine.address, frames)
    assert status == grpc.StatusCode.INVALID_ARGUMENT


def test_a_frame_above_the_limit_is_refused_unread(engine):
    huge = pb.ClientFrame(chunk=pb.Chunk(data=bytes(3 << 20))).SerializeToString()
    _, status = converse(engine.address, [JOIN, READY, huge])
    assert status == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(("changes", "named"), [
    ({"protocol": PROTOCOL + 1}, str(PROTOCOL + 1)), ({"protocol": PROTOCOL - 1, "schema": b""}, str(PROTOCOL - 1)),
    ({"fedlora_version": "7.3.0"}, "7.3.0"), ({"schema": b"\xab" * 32}, "schema abababab"),
    ({"schema": b""}, "schema unnamed")])
@pytest.mark.parametrize("more", [b"", UNKNOWN], ids=["known fields", "a field more"])
def test_versions_that_do_not_fit_are_refused_by_name(engine, changes, named, more):
    if more and "fedlora_version" in changes:
        changes = changes | {"schema": b"\xcd" * 32}  # versions with the same schema have the same fields
    frame = with_unknown_inside(1, join_frame(**changes).join) if more else join_frame(**changes).SerializeToString()
    [heard], _ = converse(engine.address, [frame])
    assert heard.refused.code == "version-mismatch"
    assert fedlora.__version__ in heard.refused.detail and named in heard.refused.detail


def test_an_upload_that_nobody_asked_for_is_too_late_and_the_stream_goes_on(engine):
    heard, status = converse(engine.address, [JOIN, READY, *upload_frames(), *upload_frames()])
    assert [frame.ack.refusal.code for frame in heard[1:]] == ["too-late", "too-late"]
    assert status == grpc.StatusCode.OK or heard[-1].WhichOneof("kind") == "ack"


def test_an_upload_that_cannot_be_stored_is_refused_and_the_stream_goes_on(engine, monkeypatch):
    with monkeypatch.context() as without, ThreadPoolExecutor() as pool:
        without.setattr(engine, "_uploads", engine._uploads / "taken away")
        client = Connection(engine.address, "unlucky", private=False)
        client.join()
        client.ready()
        while node_id("unlucky") not in engine.idle():
            engine.wait([], 0.1)
        order = RoundPlan(RUN, 1, 0, wire.tensors_digest({}))
        [sent] = engine.push_messages([train_message(order, to_record(STATE), node_id("unlucky"))])
        plan, _ = client.next_request()
        answer = pool.submit(client.send, Upload(*plan.key, tensors=UPLOAD, steps=1)).result(10.0)
        assert answer is not None and answer.code == "unavailable"
        engine.cancel([sent])
        client.leave()


def test_an_upload_that_announces_a_petabyte_is_refused_from_its_header(engine):
    header = pb.Upload(key=KEY, tensors=[pb.Tensor(name="head.out.bias", shape=[1 << 48])], steps=1)
    heard, _ = converse(engine.address, [JOIN, READY, pb.ClientFrame(upload=header).SerializeToString(), END])
    assert heard[1].ack.HasField("refusal")


client_frames = st.sampled_from([
    JOIN, READY, END, CHUNK, EARLY, *upload_frames(), upload_head(), CHUNK + READY, b"\x22", b"\x22\x02\x0a\x00",
    pb.ClientFrame(declined=pb.Declined(key=KEY, refusal=pb.Refusal(code="policy"))).SerializeToString(),
    pb.ClientFrame(ready=pb.Ready(working=KEY)).SerializeToString(),
    pb.ClientFrame(leave=pb.Leave()).SerializeToString()]) | st.binary(max_size=60)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(client_frames, max_size=8))
def test_no_frames_of_a_client_crash_the_server(engine, frames):
    with grpc.insecure_channel(engine.address) as channel:
        call = channel.stream_stream(wire.SERVICE)(iter([JOIN, *frames]), timeout=5)
        try:
            for data in call:
                pb.ServerFrame.FromString(data)
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_after_all_that_the_server_works_and_holds_no_streams(engine):
    assert_still_works(engine, 1)
    deadline = time.monotonic() + 10
    while engine.get_node_ids() and time.monotonic() < deadline:
        engine.wait([], 0.1)
    assert engine.get_node_ids() == []


class HostileServer:
    """A server that welcomes a client properly, waits for its Ready, and then sends the given frames."""

    def __init__(self, frames: list[bytes], *, welcome: bool = True) -> None:
        def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            next(requests)
            if welcome:
                yield welcome_frame()
                next(requests)
            yield from frames
            yield pb.ServerFrame(goodbye=pb.Goodbye(reason="enough")).SerializeToString()

        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.stream_stream_rpc_method_handler(serve)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            "fedlora.Federation", {"Session": handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def __enter__(self) -> str:
        return self.address

    def __exit__(self, *_) -> None:
        self._server.stop(0)


def meet(frames: list[bytes], **kwargs):
    """Return what an honest client gets from a hostile server: a task, or the error that ends its connection."""
    with HostileServer(frames, **kwargs) as address:
        connection = Connection(address, "north", private=False, connect_timeout_s=3)
        try:
            connection.join()
            connection.ready()
            return connection.next_request()
        except (WireError, Refused, Goodbye, RunChanged, ServerUnreachable) as error:
            return error
        finally:
            connection.leave()


def request_frames(request: pb.TrainRequest = REQUEST, tensors=STATE) -> list[bytes]:
    return list(wire.transfer_frames(request_head(request), tensors))


def request_head(request: pb.TrainRequest = REQUEST) -> bytes:
    return pb.ServerFrame(request=request).SerializeToString()


def changed_request(**changes) -> pb.TrainRequest:
    request = pb.TrainRequest.FromString(REQUEST.SerializeToString())
    for name, value in changes.items():
        setattr(request.run if name in pb.RunPlan.DESCRIPTOR.fields_by_name else request, name, value)
    return request


@pytest.mark.parametrize("frames", [
    [b"\xff\xff"], [b""], [CHUNK], [END],
    [request_head(), b"\x22\x05\x0a\x03abc"], [request_head(), request_head()], [CHUNK + END],
    [request_head(), LONG], [request_head(), END], [request_head(), EARLY], [EARLY + request_head()],
    request_frames(changed_request(strategy="\x1b[2J")), request_frames(changed_request(lr=float("nan"))),
    request_frames(changed_request(rank=0)), request_frames(changed_request(run_id="f" * 16)),
    request_frames(changed_request(wire_dtype="bf16")), request_frames(changed_request(fedlora_version="\x1b[2J")),
    request_frames(wire.request_to_wire(RoundPlan(RUN, 1, 0, wire.tensors_digest({})), {"\x1b[2J": (1,)})),
    [with_unknown_inside(3, REQUEST)], [request_head() + UNKNOWN], [with_unknown_inside(6, pb.Ack(key=KEY))],
    [with_unknown_inside(8, pb.Goodbye(reason="finished"))],
    [with_unknown_inside(3, pb.TrainRequest.FromString(b"\x0a\x03" + UNKNOWN + REQUEST.SerializeToString()))],
], ids=range(23))
def test_a_server_that_breaks_the_protocol_gets_a_typed_error_at_the_client(frames):
    assert isinstance(meet(frames), WireError)


def test_what_is_no_fedlora_server_is_named_so():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with pytest.raises(WireError, match="not a FedLoRA server"):
        Connection(f"127.0.0.1:{port}", "north", private=False, connect_timeout_s=3).join()
    server.stop(0)


@pytest.mark.parametrize("more", [b"", UNKNOWN], ids=["known fields", "a field more"])
@pytest.mark.parametrize("changes", [{"protocol": PROTOCOL - 1, "schema": b""}, {"protocol": PROTOCOL + 1},
                                     {"schema": b"\xab" * 32}], ids=["older", "newer", "drifted"])
def test_a_server_of_another_version_is_refused_by_name(changes, more):
    other = wire.proposal_to_wire(Proposal(RUN))
    other.fedlora_version = "0.0.9"
    other.ClearField("run")  # as sent by an older version, which does not know the field
    for name, value in changes.items():
        setattr(other, name, value)
    frame = with_unknown_inside(1, other) if more else pb.ServerFrame(welcome=other).SerializeToString()
    met = meet([frame], welcome=False)
    assert isinstance(met, Refused) and met.refusal.code == "version-mismatch"
    assert all(said in met.refusal.detail for said in ("0.0.9", f"protocol {other.protocol}", wire.SPOKEN))


def test_a_server_of_this_version_whose_welcome_has_a_field_more_is_a_typed_error():
    met = meet([with_unknown_inside(1, wire.proposal_to_wire(Proposal(RUN)))], welcome=False)
    assert isinstance(met, WireError) and "does not know" in str(met)


def test_a_newer_servers_refusal_is_heard_though_it_says_more():
    met = meet([with_unknown_inside(2, pb.Refusal(code="version-mismatch", detail="install 2.0"))], welcome=False)
    assert isinstance(met, Refused) and "install 2.0" in str(met)


@pytest.mark.parametrize("run_id", ["../../../elsewhere", "/etc", "", "AB" * 8, "a" * 15, "\x1b[2J" + "a" * 12,
                                    "[red]" + "a" * 11])
def test_a_welcome_whose_run_id_could_steer_a_path_or_a_terminal_is_a_typed_error(run_id):
    hostile = wire.proposal_to_wire(Proposal(RUN))
    hostile.run.run_id = run_id
    met = meet([pb.ServerFrame(welcome=hostile).SerializeToString()], welcome=False)
    assert isinstance(met, WireError) and "run_id" in str(met) and "\x1b" not in str(met)


def test_a_welcome_with_a_mechanism_that_this_version_does_not_know_is_refused_by_name():
    hostile = wire.proposal_to_wire(Proposal(RUN))
    hostile.run.mechanism = "of-next-year"
    met = meet([pb.ServerFrame(welcome=hostile).SerializeToString()], welcome=False)
    assert isinstance(met, WireError) and "mechanism is 'of-next-year'" in str(met)


@pytest.mark.parametrize("name", ["", "\x1b]0;owned\x07", "a" * 201])
def test_a_welcome_whose_model_has_no_printable_name_is_a_typed_error(name):
    hostile = wire.proposal_to_wire(Proposal(RUN))
    hostile.run.model_name = name
    met = meet([pb.ServerFrame(welcome=hostile).SerializeToString()], welcome=False)
    assert isinstance(met, WireError) and "name" in str(met) and "\x1b" not in str(met)


def test_a_server_that_does_not_welcome_is_a_typed_error():
    assert isinstance(meet([CHUNK], welcome=False), WireError)


server_frames = st.sampled_from([*request_frames(), request_head(), CHUNK, EARLY, END, *(
    pb.ServerFrame(**frame).SerializeToString() for frame in (
        {"cancel": KEY}, {"ack": pb.Ack(key=KEY)}, {"goodbye": pb.Goodbye(reason="\x07")},
        {"refused": pb.Refusal(code="policy")}))]) | st.binary(max_size=60)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(server_frames, max_size=6))
def test_no_frames_of_a_server_crash_or_hang_the_client(frames):
    met = meet(frames)
    if isinstance(met, tuple):
        assert all(np.array_equal(met[1][name], STATE[name]) for name in STATE)
