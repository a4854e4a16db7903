"""Random changes of the protocol's frames, for servers and clients: `python -m tests.attacks fuzz --frames 100000`."""

from __future__ import annotations

import random
import resource
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fedlora import wire
from fedlora.plan import Proposal, Refused
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.packages import Closing
from fedlora.secure_sum.roster import Entry, run_digest
from fedlora.wire import WireError, pb
from fedlora.wire.sums import (
    closing_to_wire,
    membership_from_wire,
    membership_to_wire,
    package_from_wire,
    package_to_wire,
    reveal_to_wire,
    roster_to_wire,
)
from fedlora_client.connection import Connection, Goodbye, RunChanged, ServerUnreachable
from fedlora_client.sums import SumMember
from tests.client.sum_server import SENT, order_frames, roster_of, secure_plan, terms_of, welcome_of
from tests.fedlora.secure_sums import Sum, identity_of, roster
from tests.identities import channel_of
from tests.server.test_grpc_hostile import (
    CHUNK,
    EARLY,
    END,
    JOIN,
    KEY,
    READY,
    RUN,
    join_frame,
    request_frames,
    request_head,
    upload_frames,
    upload_head,
    welcome_frame,
)

_POLICY = pb.Refusal(code="policy")


def _of_a_sum() -> tuple[list[pb.ClientFrame], list[pb.ServerFrame]]:
    """Return what clients and what a server say in a secure sum of four members, of whom one drops out."""
    total, name = Sum(roster(4), attempt=0), "site-000"
    total.packages()
    total.requests()
    total.collect({"site-003"})
    total.close()
    closing = total.collector.closing()
    assert closing is not None
    agreement = pb.Agreement(key=KEY, signature=closing.signatures[name])
    answers = (pb.SumAnswer(roster=total.roster.digest), pb.SumAnswer(agreement=agreement),
               pb.SumAnswer(package=package_to_wire(total.members[name].offer(), KEY)),
               pb.SumAnswer(reveal=reveal_to_wire(total.members[name].reveal(closing), KEY)),
               pb.SumAnswer(declined=pb.Declined(key=KEY, refusal=_POLICY)))
    requests = (pb.SumRequest(roster=roster_to_wire(total.roster)), pb.SumRequest(package=KEY),
                pb.SumRequest(survivors=pb.Survivors(key=KEY, names=closing.survivors)),
                pb.SumRequest(closing=closing_to_wire(closing, KEY)))
    ready = pb.Ready(membership=membership_to_wire(total.roster.entries[0], 1.0))
    return ([pb.ClientFrame(ready=ready), *(pb.ClientFrame(sum=answer) for answer in answers)],
            [pb.ServerFrame(sum=request) for request in requests])


_SUMS_OF_CLIENTS, _SUMS_OF_SERVERS = _of_a_sum()
FROM_CLIENTS = (JOIN, READY, END, CHUNK, EARLY, *upload_frames(), upload_head(), *(
    pb.ClientFrame(**frame).SerializeToString() for frame in (
        {"ready": pb.Ready(working=KEY, labels=["a", "b"])}, {"declined": pb.Declined(key=KEY, refusal=_POLICY)},
        {"declined": pb.Declined(refusal=_POLICY)}, {"leave": pb.Leave()})),
    *(frame.SerializeToString() for frame in _SUMS_OF_CLIENTS))
FROM_SERVERS = (*request_frames(), request_head(), CHUNK, EARLY, END, *(
    pb.ServerFrame(**frame).SerializeToString() for frame in (
        {"welcome": wire.proposal_to_wire(Proposal(RUN))}, {"cancel": KEY}, {"ack": pb.Ack(key=KEY, refusal=_POLICY)},
        {"goodbye": pb.Goodbye(reason="finished")}, {"refused": _POLICY})),
    *(frame.SerializeToString() for frame in _SUMS_OF_SERVERS))
LENGTHS = (0, 1, 127, 128, 2**31 - 1, 2**32, 2**63)
NUMBERS = (0, 1, -1, 2**31 - 1, -2**31, 2**32 - 1, 2**62, -2**63, 2**64 - 1)


CHANNELS = 8
"""Connections that one fuzzer uses in turn."""


class Mutator:
    """Makes changed frames out of real ones.

    Args:
        kind: pb.ClientFrame or pb.ServerFrame.
        known: frames as a correct peer would send them.
    """

    def __init__(self, kind: type[Message], known: Sequence[bytes], choice: random.Random) -> None:
        self._kind, self._known, self._choice = kind, known, choice
        self._ways: tuple[Callable[[bytes], bytes], ...] = (
            self._unchanged, self._flipped, self._cut, self._spliced, self._lying, self._doubled, self._other_fields,
            self._noise)

    def frame(self) -> bytes:
        """Return a known frame, changed in one way or in two."""
        data = self._choice.choice(self._known)
        for _ in range(self._choice.choice((1, 1, 2))):
            data = self._choice.choice(self._ways)(data)
        return data

    def _unchanged(self, data: bytes) -> bytes:
        return data

    def _noise(self, data: bytes) -> bytes:
        return self._choice.randbytes(self._choice.randrange(80))

    def _flipped(self, data: bytes) -> bytes:
        bent = bytearray(data)
        for _ in range(self._choice.randint(1, 8) if bent else 0):
            bent[self._place(data)] ^= 1 << self._choice.randrange(8)
        return bytes(bent)

    def _cut(self, data: bytes) -> bytes:
        return data[:self._place(data)]

    def _spliced(self, data: bytes) -> bytes:
        other = self._choice.choice(self._known)
        return data[:self._place(data)] + other[self._place(other):]

    def _doubled(self, data: bytes) -> bytes:
        first, last = sorted((self._place(data), self._place(data)))
        return data[:last] + data[first:last] * self._choice.randint(1, 50) + data[last:]

    def _lying(self, data: bytes) -> bytes:
        """Return the frame with a wrong length prefix in some place."""
        place, length = self._place(data), self._choice.choice(LENGTHS)
        varint = bytearray()
        while length > 127:
            varint.append(length & 127 | 128)
            length >>= 7
        return data[:place] + bytes([*varint, length]) + data[place + 1:]

    def _other_fields(self, data: bytes) -> bytes:
        """Return a frame that can be decoded and has other values."""
        frame = self._kind()
        try:
            frame.ParseFromString(data)
        except DecodeError:
            return data
        message: Message = frame
        while inside := [value for field, value in message.ListFields() if field.message_type is not None
                         and not field.is_repeated]:
            message = self._choice.choice(inside)
            if self._choice.random() < 0.3:
                break
        field = self._choice.choice(message.DESCRIPTOR.fields) if message.DESCRIPTOR.fields else None
        if field is not None:
            self._set(message, field)
        return frame.SerializeToString()

    def _set(self, message: Message, field: FieldDescriptor) -> None:
        message.ClearField(field.name)
        if field.message_type is not None:
            if field.is_repeated:
                for _ in range(self._choice.choice((0, 1, 300))):
                    getattr(message, field.name).add()
            else:
                getattr(message, field.name).SetInParent()
        elif field.is_repeated:
            value = self._value(field)
            if value is not None:
                getattr(message, field.name).extend([value] * self._choice.choice((0, 1, 2000)))
        elif (value := self._value(field)) is not None:
            setattr(message, field.name, value)

    def _value(self, field: FieldDescriptor) -> object:
        """Return a random value of the field's type; None for a number that does not fit it."""
        kinds = FieldDescriptor
        if field.cpp_type in (kinds.CPPTYPE_FLOAT, kinds.CPPTYPE_DOUBLE):
            return self._choice.choice((0.0, -0.0, 1e-45, 1e38, -1.0, float("inf"), float("nan")))
        if field.cpp_type == kinds.CPPTYPE_BOOL:
            return self._choice.random() < 0.5
        if field.cpp_type == kinds.CPPTYPE_STRING:
            if field.type == kinds.TYPE_BYTES:
                return self._choice.randbytes(self._choice.choice((0, 1, 16, 32, 68, 5000)))
            return self._choice.choice(("", "\x1b[2J", "\u202e", "../../etc", "é" * 3000, "%s", "a\nb", "[red]"))
        number = self._choice.choice(NUMBERS)
        signed = field.cpp_type in (kinds.CPPTYPE_INT32, kinds.CPPTYPE_INT64, kinds.CPPTYPE_ENUM)
        bits = 64 if field.cpp_type in (kinds.CPPTYPE_INT64, kinds.CPPTYPE_UINT64) else 32
        low, high = (-2**(bits - 1), 2**(bits - 1)) if signed else (0, 2**bits)
        return number if low <= number < high else None

    def _place(self, data: bytes) -> int:
        return self._choice.randrange(len(data)) if data else 0


def to_server(address: str, frames: int, seed: int, goes_on: Callable[[], bool] = lambda: True,
              identities: Sequence[Path] = ()) -> Counter:
    """Send changed frames to a server, a few on each stream. Most streams begin with a correct Join.

    Args:
        address: the server's.
        frames: how many to send at least.
        seed: decides what is sent.
        goes_on: returns False when no further stream should be opened.
        identities: folders of certificates to show in turn over mutual TLS, each named as its certificate; () for
            plaintext.

    Returns:
        How streams ended, and "frames": how many were handed to gRPC on streams that the server took.
    """
    choice, met, sent = random.Random(seed), Counter(), Counter()
    mutator = Mutator(pb.ClientFrame, FROM_CLIENTS, choice)

    def stream(number: int) -> Iterator[bytes]:
        if choice.random() < 0.9:
            name = identities[number % CHANNELS % len(identities)].name if identities else f"fuzz {seed}.{number}"
            join = join_frame(name, process=choice.randbytes(16), private=True)
            yield join.SerializeToString()
            if choice.random() < 0.7:
                yield READY
        for _ in range(choice.randint(1, 4)):
            sent[number] += 1
            yield mutator.frame()
        yield pb.ClientFrame(leave=pb.Leave()).SerializeToString()

    with ExitStack() as stack:  # a channel each: the server takes one stream of it
        channels = [stack.enter_context(
            channel_of(address, identities[place % len(identities)], wire.CHANNEL_OPTIONS) if identities else
            grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS)) for place in range(CHANNELS)]
        for number in count():
            if met["frames"] >= frames or not goes_on():
                break
            call = channels[number % len(channels)].stream_stream(wire.SERVICE)(stream(number), timeout=20)
            try:
                for data in call:
                    pb.ServerFrame.FromString(data)
                met["ended in order"] += 1
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAVAILABLE:
                    sent.pop(number, None)
                met[error.code().name] += 1
                if error.code() == grpc.StatusCode.INTERNAL and "the server failed" in (error.details() or ""):
                    met["ERRORS OF THE SERVER"] += 1
            met["frames"] += sent.pop(number, 0)
    return met


def to_clients(frames: int, seed: int) -> Counter:
    """Send changed frames to real client connections in this process, a few to each.

    Every other client is a member of secure sums. Most of these are first led into a sum as the protocol has it.

    Returns:
        How connections ended, "frames": how many were handed to gRPC, and "MB at most" of this process.
    """
    choice, met = random.Random(seed), Counter()
    mutator = Mutator(pb.ServerFrame, FROM_SERVERS, choice)
    welcome, secure_welcome = welcome_frame(), welcome_of(_PLAN)
    goodbye = pb.ServerFrame(goodbye=pb.Goodbye(reason="enough")).SerializeToString()

    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        secure = pb.ClientFrame.FromString(next(requests)).join.name == MEMBER
        speaks = mutator
        if choice.random() < 0.9:
            yield secure_welcome if secure else welcome
            ready = pb.ClientFrame.FromString(next(requests)).ready
            if secure and choice.random() < 0.8:
                known = yield from _leading(ready, requests)
                speaks = Mutator(pb.ServerFrame, known, choice)
        for _ in range(choice.randint(1, 4)):
            met["frames"] += 1
            yield speaks.frame()
        yield goodbye

    failed: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, failed.append
    server = grpc.server(ThreadPoolExecutor(4), options=wire.SERVER_OPTIONS)
    service, method = wire.SERVICE.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        service, {method: grpc.stream_stream_rpc_method_handler(serve)}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        while met["frames"] < frames:
            for secure in (False, True):
                met[_meet(address, secure=secure)] += 1
    finally:
        server.stop(0)
        threading.excepthook = before
    if failed:
        met["ERRORS OF THREADS"] = len(failed)
    met["MB at most"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return met


MEMBER = "north"
"""Name of the clients that take part in secure sums."""
_FELLOWS = {name: X25519PrivateKey.generate() for name in ("south", "west")}
_PLAN = secure_plan()


def _leading(ready: pb.Ready, requests: Iterator[bytes]) -> Generator[bytes, None, list[bytes]]:
    """Lead a client into a secure sum, and return the frames with which the protocol would go on."""

    def asks(**request: Message) -> bytes:
        return pb.ServerFrame(sum=pb.SumRequest(**request)).SerializeToString()

    entry, _ = membership_from_wire(ready.membership, MEMBER)
    run = run_digest(_PLAN)
    of = roster_of(_PLAN, [entry, *(Entry.signed(name, identity_of(name).chain_pem, public_bytes(sealing), run,
                                                 identity_of(name).key) for name, sealing in _FELLOWS.items())])
    yield asks(roster=roster_to_wire(of))
    next(requests)
    yield asks(package=KEY)
    collector = Collector(of, round=KEY.round, attempt=KEY.attempt)
    collector.add_package(package_from_wire(pb.ClientFrame.FromString(next(requests)).sum.package))
    for name, sealing in _FELLOWS.items():
        collector.add_package(Attendance(name, of, identity_of(name).key, sealing, round=KEY.round,
                                         attempt=KEY.attempt).offer())
    names = tuple(of.members)
    return [*order_frames(_PLAN, KEY, collector.form_cohort(SENT)[MEMBER]), asks(roster=roster_to_wire(of)),
            asks(package=KEY), asks(survivors=pb.Survivors(key=KEY, names=names)),
            asks(closing=closing_to_wire(Closing(names, dict.fromkeys(names, b"s" * 70)), KEY))]


def _meet(address: str, *, secure: bool) -> str:
    """Return how one connection ends: a typed error's name, "a request", or another error's name in capitals."""
    connection = Connection(address, MEMBER if secure else "south", private=secure, connect_timeout_s=3)
    try:
        plan = connection.join().plan
        connection.ready(member=SumMember(_PLAN, lambda: identity_of(MEMBER), terms_of(plan)) if secure else None)
        connection.next_request()
        return "a request"
    except (WireError, Refused, Goodbye, RunChanged, ServerUnreachable) as error:
        return type(error).__name__
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"
    finally:
        connection.leave()
