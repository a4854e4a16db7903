"""Scripted clients of secure sums for tests: threads with real channels and frames, and `secure_sum.Attendance`.

They train nothing: each encodes a vector that a test can compute too (`vector_of`).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import fedlora
from fedlora import wire
from fedlora.identity.folder import Identity
from fedlora.plan import PROTOCOL, Refusal, RoundPlan, RunPlan, Upload
from fedlora.secure_sum.masks import public_bytes
from fedlora.secure_sum.member import Attendance
from fedlora.secure_sum.packages import SUM, sent_digest
from fedlora.secure_sum.roster import Entry, Roster, run_digest
from fedlora.wire import Key, Repeats, pb
from fedlora.wire.sums import (
    closing_from_wire,
    cohort_from_wire,
    membership_to_wire,
    package_to_wire,
    reveal_to_wire,
    roster_from_wire,
    survivors_from_wire,
)
from tests.fedlora.secure_sums import identity_of

PACKAGE, UPLOAD, AGREEMENT, REVEAL = STEPS = ("package", "upload", "agreement", "reveal")
"""What a client does in an attempt. A client that drops out does so just before one of them."""

NAMES = tuple(f"site-{number:03}" for number in range(100))


def vector_of(name: str, key: Key, values: int) -> np.ndarray:
    """Return what a client encodes in one attempt at a round."""
    generator = np.random.default_rng([*name.encode(), key[1], key[2]])
    return generator.integers(-10_000, 10_000, values)


class DroppedOut(Exception):
    """Raised in a client's thread when it is to drop out."""


@dataclass
class Stream:
    """One stream of a client, and the order that is arriving on it."""

    outgoing: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)
    sent: Repeats = field(default_factory=Repeats)
    received: Repeats = field(default_factory=Repeats)
    order: tuple[RoundPlan, pb.TrainRequest, wire.Incoming, dict[str, np.ndarray]] | None = None

    def requests(self) -> Iterator[bytes]:
        while (frame := self.outgoing.get()) is not None:
            yield frame

    def send(self, frame: pb.ClientFrame) -> None:
        self.outgoing.put(frame.SerializeToString())


class SumClient:
    """A client that takes part in secure sums until it drops out or is told goodbye. It connects again when it is lost.

    Args:
        address: the server's.
        name: one of `NAMES`.
        plan: the run's plan.
        drops: (step, round, attempt) before which it drops out for good.
        silent: (step, round, attempt) that it never does, while it stays connected.
        noise: the noise that it announces, in units of the plan's clip norm.
        declines: whether it refuses every roster.
        identity: its key and certificate; None for those that the tests' authority signs.

    Attributes:
        trained: the orders that it has trained for, each once.
        rosters: the rosters that it was told.
        signed: (round, attempt) → each distinct set of survivors that it was asked to sign.
        received: for each training, the names of the tensors that it was sent.
        frozen: the frozen tensors that it holds.
        acks: the acknowledgements of its uploads.
        statuses: the statuses with which its streams ended.
    """

    def __init__(self, address: str, name: str, plan: RunPlan, *, drops: Sequence[tuple[str, int, int]] = (),
                 silent: Sequence[tuple[str, int, int]] = (), noise: float = 1.0, declines: bool = False,
                 identity: Identity | None = None) -> None:
        self.address, self.name, self._plan, self._run = address, name, plan, run_digest(plan)
        self.drops, self.silent, self._noise, self.declines = set(drops), set(silent), noise, declines
        self.trained: list[Key] = []
        self.rosters: list[Roster] = []
        self.signed: dict[tuple[int, int], set[tuple[str, ...]]] = {}
        self.acks: list[Refusal | None] = []
        self.statuses: list[grpc.StatusCode] = []
        self.goodbye: str | None = None
        self._identity, self._process, self._secret = identity or identity_of(name), os.urandom(16), b""
        self._signing = load_pem_private_key(self._identity.key_pem, None)
        self._sealing = X25519PrivateKey.generate()
        self.entry = Entry.signed(name, self._identity.chain_pem, public_bytes(self._sealing), self._run, self._signing)
        self._attendances: dict[tuple[bytes, int, int], Attendance] = {}
        self._uploads: dict[Key, Upload] = {}
        self.frozen: dict[str, np.ndarray] = {}
        self.received: list[set[str]] = []
        self._working: Key | None = None
        self._leaving = threading.Event()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._take_part, name=name, daemon=True)

    def start(self) -> SumClient:
        self._thread.start()
        return self

    def leave(self) -> None:
        """Break the stream and do not come back."""
        leave([self])

    def membership(self) -> pb.Membership | None:
        """Return what it gives for its place in a roster."""
        return membership_to_wire(self.entry, self._noise)

    def lose_connection(self) -> None:
        """Break the stream; the client comes back."""
        if self._call is not None:
            self._call.cancel()

    def _take_part(self) -> None:
        while not self._leaving.is_set() and self.goodbye is None:
            try:
                self._converse()
            except grpc.RpcError as error:
                self.statuses.append(error.code())
                time.sleep(0.05)
            except DroppedOut:
                return

    def _converse(self) -> None:
        stream, own = Stream(), self._identity
        stream.send(pb.ClientFrame(join=pb.Join(protocol=PROTOCOL, schema=wire.SCHEMA, name=self.name, private=True,
                                                fedlora_version=fedlora.__version__, process=self._process,
                                                secret=self._secret)))
        credentials = grpc.ssl_channel_credentials(own.authority_pem, own.key_pem, own.chain_pem)
        with grpc.secure_channel(self.address, credentials, options=wire.CHANNEL_OPTIONS) as channel:
            self._call = call = channel.stream_stream(wire.SERVICE)(stream.requests())
            try:
                for data in call:
                    frame, chunk = wire.read_frame(pb.ServerFrame, data)
                    if frame is not None:
                        self._on_frame(stream, frame)
                    if chunk is not None:
                        self._on_chunk(stream, *chunk)
            finally:
                stream.outgoing.put(None)
                call.cancel()

    def _on_frame(self, stream: Stream, frame: pb.ServerFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "welcome":
            self._secret = frame.welcome.secret
            working = None if self._working is None else wire.key_to_wire(self._working)
            stream.send(pb.ClientFrame(ready=pb.Ready(membership=self.membership(), working=working)))
            if self._working in self._uploads:
                self._send(stream, self._uploads[self._working])
        elif kind == "request":
            request = stream.received.restore(frame.request)
            shapes = wire.shapes_from(request.tensors)
            stream.order = wire.plan_from_wire(request), request, *wire.receive_in_memory(shapes, self._plan.wire_dtype)
        elif kind == "ack":
            self.acks.append(wire.refusal_from_wire(frame.ack.refusal) if frame.ack.HasField("refusal") else None)
            self._working = None
        elif kind == "cancel":
            if self._working is not None:
                declined = pb.Declined(key=frame.cancel, refusal=wire.refusal_to_wire(Refusal("unavailable")))
                stream.send(pb.ClientFrame(declined=declined))
        elif kind == "goodbye":
            self.goodbye = frame.goodbye.reason
        elif kind == "sum" and (answer := self.answer(frame.sum)) is not None:
            stream.send(pb.ClientFrame(sum=answer))

    def _on_chunk(self, stream: Stream, data: memoryview, checksum: int | None) -> None:
        assert stream.order is not None
        plan, request, incoming, packed = stream.order
        incoming.add(data)
        if checksum is None:
            return
        assert incoming.finish(checksum) is None
        self._working, key = plan.key, plan.key
        if self._does(UPLOAD, plan.round, plan.attempt):
            if key not in self._uploads:
                self._uploads.clear()  # as a client that keeps the last one
                self._uploads[key] = self._train(plan, request, wire.unpacked(packed, self._plan.wire_dtype))
            self._send(stream, self._uploads[key])

    @staticmethod
    def _send(stream: Stream, upload: Upload) -> None:
        head = pb.ClientFrame(upload=stream.sent.shorten(wire.upload_to_wire(upload))).SerializeToString()
        for frame in wire.transfer_frames(head, upload.tensors):
            stream.outgoing.put(frame)

    def _train(self, plan: RoundPlan, request: pb.TrainRequest, tensors: Mapping[str, np.ndarray]) -> Upload:
        assert plan.key not in self.trained, "trained twice for one order"
        self.trained.append(plan.key)
        self.received.append({*tensors})
        frozen = {name for name in tensors if name.endswith(self.FROZEN)}
        self.frozen |= {name: tensors[name] for name in frozen}
        trained = {name: array for name, array in tensors.items() if name not in frozen}
        attendance = self._attendance(plan.round, plan.attempt)
        attendance.accept(cohort_from_wire(request.cohort), sent_digest(wire.tensors_digest(trained),
                                                                         plan.frozen_sha256))
        values = sum(array.size for array in trained.values())
        masked = attendance.masked(vector_of(self.name, plan.key, values))
        return Upload(*plan.key, tensors=self.uploads(masked), steps=1, delta=1e-5, noise_multiplier=1.0)

    def uploads(self, masked: np.ndarray) -> dict[str, np.ndarray]:
        """Return the tensors that it uploads."""
        return {SUM: masked}

    FROZEN = ".A"
    """How names of frozen tensors end."""

    def answer(self, request: pb.SumRequest) -> pb.SumAnswer | None:
        kind = request.WhichOneof("kind")
        if kind == "roster":
            roster = roster_from_wire(request.roster, self._run)
            self.rosters.append(roster)
            refusal = wire.refusal_to_wire(Refusal("policy"))
            return pb.SumAnswer(declined=pb.Declined(refusal=refusal)) if self.declines else pb.SumAnswer(
                roster=roster.digest)
        key = request.package if kind == "package" else getattr(request, kind).key
        attendance = self._attendance(key.round, key.attempt)
        if kind == "package" and self._does(PACKAGE, key.round, key.attempt):
            return pb.SumAnswer(package=package_to_wire(attendance.offer(), key))
        if kind == "survivors" and self._does(AGREEMENT, key.round, key.attempt):
            survivors = survivors_from_wire(request.survivors.names)
            self.signed.setdefault((key.round, key.attempt), set()).add(survivors)
            return pb.SumAnswer(agreement=pb.Agreement(key=key, signature=attendance.agree(survivors)))
        if kind == "closing" and self._does(REVEAL, key.round, key.attempt):
            return pb.SumAnswer(reveal=reveal_to_wire(attendance.reveal(closing_from_wire(request.closing)), key))
        return None

    def _does(self, step: str, round: int, attempt: int) -> bool:
        """Return whether it does a step. Raise DroppedOut if it drops out before it."""
        if (step, round, attempt) in self.drops:
            raise DroppedOut
        return (step, round, attempt) not in self.silent

    def _attendance(self, round: int, attempt: int) -> Attendance:
        roster = self.rosters[-1]
        key = roster.digest, round, attempt
        if key not in self._attendances:
            self._attendances = {held: one for held, one in self._attendances.items() if held[1] >= round}
            self._attendances[key] = Attendance(self.name, roster, self._signing, self._sealing, round=round,
                                                attempt=attempt)
        return self._attendances[key]


def leave(clients: Collection[SumClient]) -> None:
    """Break the streams of clients, which do not come back."""
    for client in clients:
        client._leaving.set()
        client.lose_connection()
    for client in clients:
        client._thread.join(10)


def started(address: str, count: int, plan: RunPlan, drops: Mapping[str, Sequence[tuple[str, int, int]]] | None = None,
            ) -> dict[str, SumClient]:
    """Start so many clients. `drops` names the steps before which some drop out."""
    return {name: SumClient(address, name, plan, drops=(drops or {}).get(name, ())).start() for name in NAMES[:count]}


def expected(key: Key, survivors: Sequence[str], values: int) -> np.ndarray:
    """Return the plain sum of the survivors' vectors."""
    return np.sum([vector_of(name, key, values) for name in survivors], axis=0)
