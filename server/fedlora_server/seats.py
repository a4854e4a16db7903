"""A run's clients as the server remembers them: each one's seat, and who is remembered, forgotten and put first.

Nothing here takes a lock. `client_registry.ClientRegistry` calls all of it under its own.

Strangers cannot fill the server's memory. A client that leaves before it is ready is forgotten. Of the clients that
became ready, left and were never asked for anything, at most `MOST_AWAY` are remembered: those that were ready for the
longest time. So to have another client's name forgotten, an attacker must keep that many clients ready for longer than
the name's owner was.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from flwr.app import Message

from fedlora import wire
from fedlora.plan import Proposal, Refusal, RoundPlan, Tensors
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.wire import Key, Repeats, pb

from .engine import Outcome, node_id
from .label_sets import FEW
from .sum_answers import fits
from .upload_store import Stored

MOST_AWAY = 1024
"""Number of clients that are remembered though they left and were never asked for anything."""
ROUNDS_KNOWN = 8
"""Number of a client's rounds of which each order is remembered."""
MOST_LABELS_HELD = 100_000
"""Number of announced label names held for all clients. Beyond it, a client that announces more than `FEW` is refused.
"""


@dataclass(frozen=True)
class Member:
    """A client as the coordinator sees it.

    Attributes:
        name: its name.
        node_id: its node id (`engine.node_id`).
        joined_at: Unix time of its first Join.
        ready_at: Unix time of its first Ready, or None.
        connected: whether its stream is open. A client that is also ready can be asked to train.
        announced_labels: the label names that it disclosed. Only the first `FEW` are kept for a client that is away and
            was never asked; once the label set is fixed, the names in the set and the first `FEW` others are kept.
        asked: whether it was ever asked for anything.
        fedlora_version: the version that it runs.
        private: whether it trains with differential privacy.
        bytes_up: bytes received from it, over all its streams.
        bytes_down: bytes sent to it, over all its streams.
        state: "away", "connected" (it is not ready yet), "ready" (it waits to be asked) or "working".
        since: Unix time from which it has been in this state.
        working_on: the round that it works on, or None.
        uploaded_at: Unix time at which its last upload was taken, or None.
    """

    name: str
    node_id: int
    joined_at: float
    ready_at: float | None
    connected: bool
    announced_labels: tuple[str, ...]
    asked: bool
    fedlora_version: str
    private: bool
    bytes_up: int
    bytes_down: int
    state: str
    since: float
    working_on: int | None
    uploaded_at: float | None


@dataclass
class PendingRequest:
    """One message to one client, from when it is pushed until its reply is pulled or it is cancelled.

    Attributes:
        message_id: its id in the engine.
        message: what the strategy wants sent.
        node_id: the client's node id.
        plan: what the client is asked to do.
        tensors: the state that it starts from; emptied once it has answered.
        outcome: None while it is pending.
        stored: the upload, once it has arrived.
        cohort: the cohort that the client is in, under secure aggregation.
        answers_in: wire dtype of the upload's tensors, a key of `fedlora.wire.ARRAY_DTYPES`.
    """

    message_id: str
    message: Message
    node_id: int
    plan: RoundPlan
    tensors: Tensors
    outcome: Outcome | None = None
    stored: Stored | None = None
    cohort: pb.Cohort | None = None
    answers_in: str = "fp32"

    def frames(self, sent: Repeats) -> Iterator[bytes]:
        """Yield the request's frames for a stream. `sent` shortens what that stream has already carried."""
        request = sent.shorten(wire.request_to_wire(self.plan, wire.shapes_of(self.tensors)))
        if self.cohort is not None:
            request.cohort.CopyFrom(self.cohort)
        yield from wire.transfer_frames(pb.ServerFrame(request=request).SerializeToString(), self.tensors)


class Standing(IntEnum):
    """How much a client has done for the run. When places are short, a higher standing displaces a lower one."""

    NEW = 0
    KNOWN = 1  # it was asked for something, or it returned and showed its name's secret
    UPLOADED = 2


class ClientStream(Protocol):
    """A client's stream, as far as the registry needs it.

    The methods are called under the registry's lock, so they must return quickly.

    Attributes:
        name: the client's name; empty until it has joined.
        process: token of the client's process.
        secret: proves that the name is this client's, from its Ready on.
        came_from: address of the client's end of the connection; empty if it has none of its own.
        fingerprint: SHA-256 of its certificate's public key, in hexadecimal digits; empty without TLS.
    """

    name: str
    process: bytes
    secret: bytes
    came_from: str
    fingerprint: str

    def ask(self, order: PendingRequest) -> None:
        """Send the client an order."""

    def cancel(self, key: Key) -> None:
        """Tell the client to stop working on an order."""

    def consult(self, request: pb.SumRequest) -> None:
        """Send the client a question of a secure sum."""

    def close(self, why: Refusal | None = None) -> None:
        """End the stream. With `why`, the client is told not to open it again."""


@dataclass
class Question:
    """What a client is asked for a secure sum.

    Attributes:
        request: the question. It is sent again on each new stream until it is answered.
        roster: the roster in the question; None in a question without one.
        answer: the client's answer; None while it is awaited.
    """

    request: pb.SumRequest
    roster: Roster | None = None
    answer: pb.SumAnswer | None = None

    def is_answered_by(self, answer: pb.SumAnswer) -> bool:
        """Return whether an answer is one to this question, and not to an earlier one."""
        return fits(self.request, b"" if self.roster is None else self.roster.digest, answer)

    def is_for(self, membership: tuple[Entry, float] | None) -> bool:
        """Return whether the question can be put to a client with this membership.

        A roster without the client's present entry cannot: the client would take it for a breach of the protocol.
        """
        return self.roster is None or (membership is not None
                                       and self.roster.members.get(membership[0].name) == membership[0])


@dataclass
class Seat:
    """All that the server knows of one client. It outlasts the client's streams.

    Attributes:
        process: token of the process that joined last.
        proposal: the proposal that this process was told.
        labels: the label names that the client announced and the server kept.
        stream: the open stream, if there is one.
        ready: whether the client said on this stream that it is ready.
        working: the order that the client works on and has not answered.
        accepted: the last upload that was taken; the same upload sent again is acknowledged and dropped.
        ready_from: when it became ready on this stream, by the monotonic clock.
        ready_s: seconds for which it was ready, on all earlier streams together.
        orders: its open orders, oldest first.
        asked: the orders that it was given in the last `ROUNDS_KNOWN` of its rounds.
        asked_before: it counts as asked in every round below this one.
        since: Unix time from which its `Member.state` has been what it is.
        uploaded_at: Unix time at which its last upload was taken.
        membership: its entry in a roster of secure aggregation, and the noise that it adds at least in units of the
            plan's clip norm, as its present process gave them.
        question: what it is asked for a secure sum at this moment.
        answers_in: `PendingRequest.answers_in` of the last order that it was given; "" before the first.
    """

    name: str
    node_id: int
    process: bytes
    version: str
    private: bool
    proposal: Proposal
    joined_at: float
    ready_at: float | None = None
    secret: bytes = b""
    labels: tuple[str, ...] = ()
    stream: ClientStream | None = None
    ready: bool = False
    working: Key | None = None
    accepted: Key | None = None
    ready_from: float = 0.0
    ready_s: float = 0.0
    orders: list[PendingRequest] = field(default_factory=list)
    asked: set[Key] = field(default_factory=set)
    asked_before: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    since: float = 0.0
    uploaded_at: float | None = None
    membership: tuple[Entry, float] | None = None
    question: Question | None = None
    answers_in: str = ""

    @property
    def standing(self) -> Standing:
        """How much the client has done for the run."""
        return Standing.UPLOADED if self.accepted else Standing.KNOWN if self.asked else Standing.NEW

    @property
    def member(self) -> Member:
        """The client as the coordinator sees it."""
        state = ("away" if self.stream is None else "connected" if not self.ready else
                 "ready" if self.working is None else "working")
        return Member(self.name, self.node_id, self.joined_at, self.ready_at, self.stream is not None, self.labels,
                      bool(self.asked), self.version, self.private, self.bytes_up, self.bytes_down, state, self.since,
                      None if self.working is None else self.working[1], self.uploaded_at)

    def take(self, stream: ClientStream) -> None:
        """Let the client be reached through a stream, on which it has not said yet that it is ready."""
        self.stream, self.since = stream, time.time()

    def give(self, order: PendingRequest) -> None:
        """Add an order. Those of rounds that lie far back are forgotten one by one, and count as given all together."""
        self.orders.append(order)
        self.answers_in = order.answers_in
        self.asked.add(order.plan.key)
        if len(rounds := {key[1] for key in self.asked}) > ROUNDS_KNOWN:
            self.asked_before = max(self.asked_before, min(rounds) + 1)
            self.asked = {key for key in self.asked if key[1] >= self.asked_before}

    def was_asked(self, key: Key) -> bool:
        """Return whether the client was given an order with this key."""
        return key in self.asked or key[1] < self.asked_before

    def order(self, key: Key) -> PendingRequest | None:
        """Return the client's open order with this key, if there is one."""
        return next((order for order in self.orders if order.plan.key == key), None)

    def begin(self, working: Key | None) -> None:
        """Record that the client is ready on its stream, where it may still work on an order of an earlier stream.

        Orders that were lost are pending again.
        """
        self.ready, self.ready_from = True, time.monotonic()
        self.ready_at = self.ready_at or time.time()
        self.working, self.since = working, time.time()
        for order in self.orders:
            if order.outcome == "lost":
                order.outcome = None
        self.consult()

    def consult(self) -> None:
        """Send the question that is not answered, if there is one that can be put to the client, and it is ready."""
        if (self.stream is not None and self.ready and self.question is not None and self.question.answer is None
                and self.question.is_for(self.membership)):
            self.stream.consult(self.question.request)

    def settle(self, key: Key, answer: Stored | Refusal | None) -> bool:
        """Record the client's answer to an order, and return whether it comes too late.

        Args:
            key: the order's key.
            answer: the stored upload, or a refusal; None if an upload that had been accepted came again.
        """
        if self.working == key:
            self.working, self.since = None, time.time()
        if answer is None:
            return False
        order = self.order(key)
        if order is None or order.outcome not in (None, "lost"):
            return True
        order.outcome = answer if isinstance(answer, Refusal) else "uploaded"
        if isinstance(answer, Stored):
            order.stored, self.accepted, self.uploaded_at = answer, key, time.time()
        order.tensors = {}
        return False

    def dispatch(self) -> None:
        """Send the oldest pending order, if the client is ready and has nothing to do."""
        if self.stream is None or not self.ready or self.working is not None:
            return
        order = next((order for order in self.orders if order.outcome is None), None)
        if order is not None:
            self.working, self.since = order.plan.key, time.time()
            self.stream.ask(order)

    def vacate(self, why: Refusal | None = None) -> None:
        """Close the stream. The pending orders become "lost" until the client is ready again."""
        if self.stream is not None:
            self.stream.close(why)
        if not self.asked:
            self.labels = self.labels[:FEW]
        if self.ready:
            self.ready_s += time.monotonic() - self.ready_from
        self.stream, self.ready, self.working, self.since = None, False, None, time.time()
        for order in self.orders:
            if order.outcome is None:
                order.outcome = "lost"


class Seats:
    """The seats by node id, and the bytes that all clients have moved, the forgotten ones included."""

    def __init__(self) -> None:
        self._seats: dict[int, Seat] = {}
        self._held: dict[int, Seat] = {}
        self._moved_before = [0, 0]  # bytes up and down of the clients that are forgotten

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def get(self, node: int) -> Seat | None:
        """Return the seat of a client that is remembered, else None."""
        return self._seats.get(node)

    def of_stream(self, stream: ClientStream) -> Seat | None:
        """Return the stream's seat, or None if another stream has taken it over."""
        seat = self.named_by(stream)
        return seat if seat is not None and seat.stream is stream else None

    def named_by(self, stream: ClientStream) -> Seat | None:
        """Return the seat of the name that the stream joined with, whichever stream holds it now."""
        return self._seats.get(node_id(stream.name)) if stream.name else None

    def add(self, seat: Seat) -> None:
        """Remember a new client."""
        self._seats[seat.node_id] = seat

    # The engine's caller draws a cohort from node ids it was given, and asks it a moment later. A client may leave and
    # be forgotten in between, so the seats behind those ids are kept until the caller waits for news.

    def hold(self, seats: Iterable[Seat]) -> None:
        """Keep these clients known by `known` and `recall`, even if they are forgotten, until `let_go`."""
        self._held.update((seat.node_id, seat) for seat in seats)

    def let_go(self) -> None:
        """Stop keeping the clients that `hold` kept."""
        self._held.clear()

    def known(self, node: int) -> Seat | None:
        """Return the seat of a client that is remembered or held, else None."""
        return self._seats.get(node) or self._held.get(node)

    def recall(self, node: int) -> Seat:
        """Return the seat of a client that is remembered or held. One that was forgotten is remembered again.

        Raises:
            KeyError: the client is neither remembered nor held.
        """
        if node not in self._seats:
            seat = self._held[node]
            self._seats[node] = seat
            self._moved_before[0] -= seat.bytes_up
            self._moved_before[1] -= seat.bytes_down
        return self._seats[node]

    def forget_beyond_bound(self, gone: Seat) -> str | None:
        """Forget a client if too many are remembered now that `gone` has left. The module's docstring has the rules.

        Returns:
            The name that is free now, if a client that had been ready was forgotten.
        """
        if gone.asked:
            return None
        if gone.ready_at is None:
            self._forget(gone)
            return None
        away = [seat for seat in self if seat.stream is None and not seat.asked]
        if len(away) <= MOST_AWAY:
            return None
        first = min(away, key=lambda seat: seat.ready_s)
        self._forget(first)
        return first.name

    def _forget(self, seat: Seat) -> None:
        del self._seats[seat.node_id]
        self._moved_before[0] += seat.bytes_up
        self._moved_before[1] += seat.bytes_down

    def moved(self) -> tuple[int, int]:
        """Return the bytes received from and sent to all clients, the forgotten ones included."""
        return (self._moved_before[0] + sum(seat.bytes_up for seat in self),
                self._moved_before[1] + sum(seat.bytes_down for seat in self))

    def has_room_for(self, labels: tuple[str, ...]) -> bool:
        """Return whether these announced label names can be held beside those of the other clients."""
        return len(labels) <= FEW or len(labels) + sum(len(seat.labels) for seat in self) <= MOST_LABELS_HELD


def kept_labels(labels: tuple[str, ...], settled: tuple[str, ...]) -> tuple[str, ...]:
    """Return the announced label names worth keeping once the run's label set is `settled`.

    These are the names in the set and the first `FEW` others. Names in the set share the set's strings, so that a
    thousand clients do not hold a thousand copies.
    """
    if len(labels) <= FEW:
        return labels
    shared = {label: label for label in settled}
    others = [label for label in labels if label not in shared][:FEW]
    return tuple(shared.get(label, label) for label in labels if label in shared or label in others)
