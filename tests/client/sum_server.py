"""A server of secure sums whose every word a test gives by hand, and real client connections that answer it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import grpc
import numpy as np

from fedlora import wire
from fedlora.plan import AGGREGATE, GOODBYES, Proposal, Refusal, Refused, Released, RoundPlan, RunPlan, Tensors, Upload
from fedlora.privacy import RunTerms
from fedlora.secure_sum import statements
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import Closing, CohortRequest, KeyPackage, sent_digest
from fedlora.secure_sum.roster import Entry, Roster, run_digest
from fedlora.wire import Key, WireError, pb
from fedlora.wire.sums import (
    closing_to_wire,
    cohort_to_wire,
    membership_from_wire,
    package_from_wire,
    roster_to_wire,
)
from fedlora_client.connection import Connection, Goodbye, RunChanged, ServerUnreachable
from fedlora_client.sums import SumMember
from tests.federation import layout_of, plan_of, start_of
from tests.fedlora.secure_sums import identity_of
from tests.processes import PATIENCE

VALUES = 50
PATIENCE_S = 10.0 * PATIENCE
FROZEN = wire.tensors_digest({})
STATE: Tensors = start_of(layout_of("frozen-a"), seed=1)
SENT = sent_digest(wire.tensors_digest(STATE), FROZEN)
"""Digest of the tensors that every order of these tests brings."""


def secure_plan(**changes: object) -> RunPlan:
    """Return a plan with secure aggregation. `changes` replace its fields."""
    values = dict(private=True, local_steps=1, mechanism=AGGREGATE, least_members=3, expected_batch=4)
    return plan_of("ffa-lora", **values | changes)


def terms_of(plan: RunPlan, noise_multiplier: float = 2.0, clip_norm: float = 1.0) -> RunTerms:
    return RunTerms(run_id=plan.run_id, plan_sha256="", unit="row", declared_size=100, sampling_rate=0.04,
                    noise_multiplier=noise_multiplier, delta=1e-5, clip_norm=clip_norm, scales={}, local_steps=1,
                    max_participations=3)


def roster_of(plan: RunPlan, entries: Iterable[Entry], noise: float = 2.0, values: int = VALUES) -> Roster:
    """Return the roster that an honest server makes of these members, whose least noise is this many clip norms."""
    members = tuple(sorted(entries, key=lambda entry: entry.name))
    grid = Grid.fitting(values, clip_norm=plan.clip_norm, expected_batch=plan.expected_batch, members=len(members),
                        noise=noise)
    deviation = noise * grid.sensitivity(values, grid.clip_norm)
    return Roster(run_digest(plan), members, plan.colluding, grid, values, deviation)


def welcome_of(plan: RunPlan) -> bytes:
    """Return the frame that welcomes a client to a run."""
    welcome = wire.proposal_to_wire(Proposal(plan))
    welcome.secret = bytes(wire.SECRET_BYTES)
    return pb.ServerFrame(welcome=welcome).SerializeToString()


def order_frames(plan: RunPlan, key: pb.Key, cohort: CohortRequest | None, tensors: Tensors = STATE,
                 frozen_sha256: str = FROZEN) -> list[bytes]:
    """Return the frames of an order to train."""
    request = wire.request_to_wire(RoundPlan(plan, key.round, key.attempt, frozen_sha256), wire.shapes_of(tensors))
    if cohort is not None:
        request.cohort.CopyFrom(cohort_to_wire(cohort))
    return list(wire.transfer_frames(pb.ServerFrame(request=request).SerializeToString(),
                                     wire.packed(tensors, plan.wire_dtype)))


class Site(threading.Thread):
    """A client with a real connection, which answers each order with a vector of its own.

    Args:
        address: the server's.
        name: the client's.
        stored: (key, upload) of an earlier process, which is sent again when it is asked for.
        options: further arguments of `SumMember`.

    Attributes:
        vector: the integers that it adds to a sum.
        uploads: key → what it has masked for it.
        told: the lines that its owner sees.
        refused: why it declined orders.
        ended: the error that ended it.
    """

    def __init__(self, address: str, name: str, *, terms: RunTerms | None = None,
                 stored: Mapping[Key, Upload] | None = None, **options: object) -> None:
        super().__init__(daemon=True)
        identity_of(name)  # made by the test's own thread, so that all have the same authority
        self._terms, self._options = terms, {"identity": lambda: identity_of(name)} | options
        self.connection = Connection(address, name, private=True, connect_timeout_s=PATIENCE_S)
        self.vector = np.random.default_rng(list(name.encode())).integers(-(1 << 18), 1 << 18, VALUES)
        self.uploads: dict[Key, Upload] = dict(stored or {})
        self.told: list[str] = []
        self.refused: list[str] = []
        self.member: SumMember | None = None
        self.ended: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            plan = self.connection.join().plan
            if plan.secure_aggregation:
                self.member = SumMember(plan, terms=self._terms or terms_of(plan),
                                        tell=lambda line, key: self.told.append(line), **self._options)
            self.connection.ready(member=self.member)
            while True:
                order, tensors = self.connection.next_request()
                self.connection.send(self._answer(order, tensors))
        except (Refused, Goodbye, RunChanged, WireError, ServerUnreachable) as error:
            self.ended = error
        finally:
            self.connection.leave()

    def _answer(self, order: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        if order.key in self.uploads:
            return self.uploads[order.key]
        part = self.member.part(order.key)
        if part is None:
            return Refusal("unavailable")
        try:
            part.accept(sent_digest(wire.tensors_digest(tensors), order.frozen_sha256))
            vector = part.masked(self.vector)
        except statements.Refused as error:
            self.refused.append(str(error))
            return Refusal("policy")
        self.uploads[order.key] = Upload(*order.key, tensors=Released({"sum": vector}), steps=1)
        return self.uploads[order.key]

    def end(self) -> Exception | None:
        """Wait until this client has ended, and return the error that ended it."""
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the client did not end"
        return self.ended


class _Seat:
    """What the server holds of one client's streams: what it said, and where to say something to it."""

    def __init__(self) -> None:
        self.heard: SimpleQueue[pb.ClientFrame | tuple[memoryview, int | None]] = SimpleQueue()
        self.outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self.context: grpc.ServicerContext | None = None


class SumServer:
    """A gRPC server that welcomes clients to a run, and says nothing by itself.

    Args:
        plan: the run's plan.
        credentials: for TLS; None listens without.
    """

    def __init__(self, plan: RunPlan | None = None, credentials: grpc.ServerCredentials | None = None) -> None:
        self.plan = plan or secure_plan()
        self.run = run_digest(self.plan)
        self._seats: dict[str, _Seat] = {}
        self._server = grpc.server(ThreadPoolExecutor(24), options=wire.SERVER_OPTIONS)
        service, method = wire.SERVICE.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
            service, {method: grpc.stream_stream_rpc_method_handler(self._serve)}),))
        port = (self._server.add_insecure_port("127.0.0.1:0") if credentials is None else
                self._server.add_secure_port("127.0.0.1:0", credentials))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        name = wire.parse(pb.ClientFrame, next(requests)).join.name
        seat = self._seats.setdefault(name, _Seat())
        outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        yield welcome_of(self.plan)

        def read() -> None:
            uploads = wire.Repeats()
            try:
                for data in requests:
                    for part in wire.read_frame(pb.ClientFrame, data):
                        if part is not None:
                            if isinstance(part, pb.ClientFrame) and part.HasField("ready"):
                                seat.outgoing, seat.context = outgoing, context
                            if isinstance(part, pb.ClientFrame) and part.HasField("upload"):
                                part.upload.CopyFrom(uploads.restore(part.upload))
                            seat.heard.put(part)
            except grpc.RpcError:
                pass  # the stream broke, as a test wants it
            finally:
                outgoing.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (frame := outgoing.get()) is not None:
            yield frame

    def close(self) -> None:
        """Say goodbye to all clients, wait until their streams have ended, and stop."""
        for name in self._seats:
            self.say(name, pb.ServerFrame(goodbye=pb.Goodbye(reason=GOODBYES["finished"])).SerializeToString())
        self._server.stop(PATIENCE_S).wait()

    def say(self, name: str, *frames: bytes) -> None:
        for frame in frames:
            self._seats[name].outgoing.put(frame)

    def hear(self, name: str) -> pb.ClientFrame | tuple[memoryview, int | None]:
        """Return the next that a client says."""
        deadline = time.monotonic() + PATIENCE_S
        while name not in self._seats:
            assert time.monotonic() < deadline, f"{name} did not come"
            time.sleep(0.01)
        try:
            return self._seats[name].heard.get(timeout=PATIENCE_S)
        except Empty:
            raise AssertionError(f"{name} said nothing") from None

    def drop(self, name: str) -> pb.Ready:
        """Break a client's stream, and return its next Ready."""
        self._seats[name].context.cancel()
        return self.ready(name)

    def ready(self, name: str) -> pb.Ready:
        frame = self.hear(name)
        assert frame.WhichOneof("kind") == "ready", frame
        return frame.ready

    def entry(self, name: str) -> tuple[Entry, float]:
        return membership_from_wire(self.ready(name).membership, name)

    def roster(self, entries: Iterable[Entry], noise: float = 2.0, **changes: object) -> Roster:
        """Return the roster that an honest server makes of these members; `changes` replace its fields."""
        return dataclasses.replace(roster_of(self.plan, entries, noise), **changes)

    def request(self, name: str, request: pb.SumRequest) -> None:
        self.say(name, pb.ServerFrame(sum=request).SerializeToString())

    def ask(self, name: str, request: pb.SumRequest) -> pb.SumAnswer:
        """Send a request, and return the answer."""
        self.request(name, request)
        frame = self.hear(name)
        assert frame.WhichOneof("kind") == "sum", frame
        return frame.sum

    def package(self, name: str, key: pb.Key) -> KeyPackage:
        return package_from_wire(self.ask(name, pb.SumRequest(package=key)).package)

    def order(self, name: str, key: pb.Key, cohort: CohortRequest | None, tensors: Tensors = STATE,
              frozen_sha256: str = FROZEN) -> None:
        """Send an order to train."""
        self.say(name, *order_frames(self.plan, key, cohort, tensors, frozen_sha256))

    def upload(self, name: str) -> np.ndarray | pb.Refusal:
        """Return the vector that a client uploads, or why it declines; and say that it arrived."""
        frame = self.hear(name)
        kind = frame.WhichOneof("kind")
        head = getattr(frame, kind)
        answer: np.ndarray | pb.Refusal
        if kind == "declined":
            answer = head.refusal
        else:
            data, checksum = self.hear(name)
            assert checksum is not None and [tensor.name for tensor in head.tensors] == ["sum"]
            [values] = head.tensors[0].shape
            answer = np.frombuffer(data, f"<u{len(data) // values}")
        self.say(name, pb.ServerFrame(ack=pb.Ack(key=head.key)).SerializeToString())
        return answer

    def agree(self, name: str, key: pb.Key, survivors: Sequence[str]) -> pb.SumAnswer:
        return self.ask(name, pb.SumRequest(survivors=pb.Survivors(key=key, names=survivors)))

    def reveal(self, name: str, key: pb.Key, closing: Closing) -> pb.SumAnswer:
        return self.ask(name, pb.SumRequest(closing=closing_to_wire(closing, key)))

    def give_roster(self, roster: Roster, names: Sequence[str] = ()) -> None:
        """Send a roster to its members, who all take it."""
        for name in names or roster.members:
            assert self.ask(name, pb.SumRequest(roster=roster_to_wire(roster))).roster == roster.digest
