"""Who is there, who was asked what, and what came of it: the state behind the gRPC and the SuperLink engine.

One lock guards everything. A client keeps its seat, by name, over broken streams; a stream that comes back with the
same process token takes over, and orders that were not answered are given to it again. Once it was ready, nobody else
has the name: whoever comes back shows its secret (`names`), or the token of the process that had it last.

What strangers can have this remember is bounded. A client that leaves before it is ready is forgotten, and of those
that were ready, are away and were never asked for anything the `MOST_AWAY` are remembered that were ready for longest:
whoever would have a name forgotten keeps more clients than there are places ready for longer than its owner was.
"""

from __future__ import annotations

import hmac
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from flwr.app import Message

from fedlora import wire
from fedlora.plan import Proposal, Refusal, Refused, RoundPlan, Tensors
from fedlora.wire import Key, Repeats, pb

from .engine import Outcome, node_id
from .names import SECRET_BYTES, Names
from .upload_store import Stored

MOST_AWAY = 1024
"""Seats of clients that were never asked for anything and are gone."""


@dataclass(frozen=True)
class Member:
    """A client as the operator sees it.

    Attributes:
        joined_at, ready_at: Unix time of the first Join, and of the first Ready or None.
        connected: whether its stream stands now. It can be asked to train if it is also ready.
        announced_labels: the label names that it disclosed.
        bytes_up, bytes_down: moved over all its streams.
    """

    name: str
    node_id: int
    joined_at: float
    ready_at: float | None
    connected: bool
    announced_labels: tuple[str, ...]
    fedlora_version: str
    private: bool
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Event:
    """Something an operator wants to see. kind: joined, ready, declined, refused, left, lost or rejoined."""

    kind: str
    name: str
    detail: str = ""


@dataclass
class PendingRequest:
    """One message to one client, until its reply is pulled or it is cancelled. `outcome` None: pending."""

    message_id: str
    message: Message
    node_id: int
    plan: RoundPlan
    tensors: Tensors
    outcome: Outcome | None = None
    stored: Stored | None = None

    def frames(self, sent: Repeats) -> Iterator[bytes]:
        """To be sent on the stream on which `sent` was sent before."""
        request = sent.shorten(wire.request_to_wire(self.plan, wire.shapes_of(self.tensors)))
        yield from wire.transfer_frames(pb.ServerFrame(request=request).SerializeToString(), self.tensors)


class ClientStream(Protocol):
    """What the registry needs of a client's stream. The calls are made under the registry's lock and must be quick."""

    name: str
    process: bytes

    def ask(self, order: PendingRequest) -> None: ...
    def cancel(self, key: Key) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Seat:
    name: str
    node_id: int
    process: bytes
    version: str
    private: bool
    proposal: Proposal  # what its process was told
    joined_at: float
    ready_at: float | None = None
    labels: tuple[str, ...] = ()
    stream: ClientStream | None = None
    ready: bool = False
    working: Key | None = None  # asked over this stream and not answered
    accepted: Key | None = None  # the last upload taken, to answer an identical one
    ready_from: float = 0.0  # monotonic
    ready_s: float = 0.0  # on all streams before this one
    orders: list[PendingRequest] = field(default_factory=list)
    asked: set[Key] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0

    def order(self, key: Key) -> PendingRequest | None:
        return next((order for order in self.orders if order.plan.key == key), None)


class ClientRegistry:
    """Seats by node id.

    Args:
        proposal: told to every client that joins, until `fix_labels`.
        notify: called with each Event, from any thread; it must be quick.
        under_way: the round of this run that an earlier server had begun, if any. Clients that work on it go on, and
            can be asked as if they were idle: they have in hand what they will be asked for.
        names: whose each name is; None where somebody else sees to that, as Flower's SuperLink does.
    """

    def __init__(self, proposal: Proposal, notify: Callable[[Event], None], *, under_way: int | None = None,
                 names: Names | None = None) -> None:
        self.proposal = proposal
        self._names = names
        self._notify = notify
        self._under_way = under_way
        self._changed = threading.Condition()
        self._news = self._seen = 0
        self._seats: dict[int, _Seat] = {}
        self._orders: dict[str, PendingRequest] = {}
        self._moved_before = [0, 0]  # bytes up and down of seats that are forgotten

    # What the streams report.

    def join(self, stream: ClientStream, join: pb.Join, told: Proposal | None = None) -> Proposal:
        """Give the stream its name's seat.

        Args:
            told: what its process was told before; None where that is not known yet.
        Returns:
            What it is to be told: what its process was told when it came first, or what new ones are told now.
        Raises:
            Refused: versions, privacy or names do not fit.
            WireError: the name or the token is not one.
        """
        ours, theirs = self.proposal.plan.fedlora_version, wire.clean(join.fedlora_version)
        if not wire.is_spoken(join) or ours.split(".")[:2] != theirs.split(".")[:2]:
            raise Refused("version-mismatch", f"the server runs FedLoRA {ours} ({wire.SPOKEN}), the client FedLoRA "
                                              f"{theirs} ({wire.spoken_by(join)}); install the same version")
        try:
            wire.check_name(join.name)
        except ValueError as error:
            raise wire.WireError(str(error)) from None
        if len(join.process) != 16:
            raise wire.WireError("the process token does not have 16 bytes")
        if len(join.secret) not in (0, SECRET_BYTES):
            raise wire.WireError(f"the name's secret does not have {SECRET_BYTES} bytes")
        if self.proposal.plan.private and not join.private:
            raise Refused("privacy-mismatch", "the server runs with --privacy required and this client with "
                                              "--epsilon inf; change one of the two flags")
        with self._changed:
            node = node_id(join.name)
            seat = self._seats.get(node)
            again = seat is not None
            if seat is None or not hmac.compare_digest(seat.process, join.process):
                self._check_name(join, seat)
            if seat is None:
                seat = _Seat(join.name, node, join.process, theirs, join.private, told or self.proposal, time.time())
                self._seats[node] = seat
            elif seat.stream is not None:
                self._vacate(seat)
            if seat.process != join.process:
                seat.proposal = told or self.proposal
            stream.name, stream.process = join.name, join.process
            seat.stream, seat.process, seat.version, seat.private = stream, join.process, theirs, join.private
            self._new(Event("rejoined" if again else "joined", seat.name))
            return seat.proposal

    def ready(self, stream: ClientStream, labels: tuple[str, ...], working: Key | None) -> bool:
        """The client has read its data; `working` names the request that it still has in hand, if any.

        Returns:
            Whether it has the seat; not if another stream has taken it over.
        """
        with self._changed:
            seat = self._seat(stream)
            if seat is None:
                return False
            if labels and not seat.proposal.announce_labels:
                raise wire.WireError("labels were announced though nobody asked for them")
            if seat.ready:
                raise wire.WireError("a client is ready once on a stream")
            seat.ready, seat.ready_from, seat.labels = True, time.monotonic(), labels or seat.labels
            seat.ready_at = seat.ready_at or time.time()
            seat.working = working
            for order in seat.orders:
                if order.outcome == "lost":
                    order.outcome = None
            if (working is not None and working != seat.accepted and seat.order(working) is None
                    and not self._left_over(seat)):
                stream.cancel(working)
            self._dispatch(seat)
            self._new(Event("ready", seat.name, f"discloses its label names {', '.join(labels)}" if labels else ""))
            return True

    def gone(self, stream: ClientStream, kind: str = "lost") -> None:
        """The stream ended. What the client was asked is lost, until it comes back."""
        with self._changed:
            seat = self._seat(stream)
            if seat is not None:
                self._vacate(seat)
                self._forget_seats(seat)
                self._new(Event(kind, seat.name))

    def expected(self, stream: ClientStream, key: Key) -> PendingRequest | None:
        """The order that an upload with this key would answer; None if it was accepted before.

        Raises:
            Refused: "too-late".
        """
        with self._changed:
            seat = self._seat(stream)
            order = seat.order(key) if seat else None
            if seat and seat.accepted == key:
                return None
            if order is None or isinstance(order.outcome, Refusal):
                raise Refused("too-late", f"round {key[1]}, attempt {key[2]}")
            return order

    def answered(self, stream: ClientStream, key: Key, answer: Stored | Refusal | None,
                 acknowledge: Callable[[Refusal | None], None] = lambda late: None) -> Refusal | None:
        """The client is done with `key`; None: it sent again what had been accepted.

        Args:
            acknowledge: given what is returned, before the client's next order is on its way.
        Returns:
            Why the answer cannot be taken after all, or None.
        """
        with self._changed:
            seat = self._seat(stream)
            if seat is None:
                refusal = Refusal("too-late")
                acknowledge(refusal)
                return refusal
            if seat.working == key:
                seat.working = None
            order = seat.order(key)
            late = order is None or order.outcome not in (None, "lost")
            if answer is None:
                late = False
            elif order is not None and not late:
                order.outcome = answer if isinstance(answer, Refusal) else "uploaded"
                if isinstance(answer, Stored):
                    order.stored, seat.accepted = answer, key
                order.tensors = {}
            declined = Refusal("too-late", f"round {key[1]}, attempt {key[2]}") if late else None
            acknowledge(declined)
            self._dispatch(seat)
            self._new(Event("refused", seat.name, str(answer)) if isinstance(answer, Refusal) and not late else None)
            return declined

    def declined(self, stream: ClientStream, refusal: Refusal) -> None:
        """The client will not take part at all."""
        with self._changed:
            self._new(Event("declined", stream.name, str(refusal)))

    def count(self, stream: ClientStream, up: int = 0, down: int = 0) -> None:
        seat = self._seats.get(node_id(stream.name)) if stream.name else None
        if seat is not None:
            with self._changed:
                seat.bytes_up += up
                seat.bytes_down += down

    # What the engine asks.

    def fix_labels(self, labels: tuple[str, ...]) -> None:
        """Tell this label set to those who join from now on, and ask them for no label names."""
        with self._changed:
            self.proposal = replace(self.proposal, plan=replace(self.proposal.plan, labels=labels))

    def members(self) -> list[Member]:
        """All that became ready, in that order, and then those that have joined and are not; without those that are
        forgotten."""
        with self._changed:
            members = [Member(s.name, s.node_id, s.joined_at, s.ready_at, s.stream is not None, s.labels, s.version,
                              s.private, s.bytes_up, s.bytes_down) for s in self._seats.values()]
        return sorted(members, key=lambda m: (m.ready_at or float("inf"), m.joined_at))

    def nodes(self, *, idle: bool) -> list[int]:
        """Connected and ready clients, sorted by name; with `idle` only those that have nothing to do."""
        with self._changed:
            seats = [s for s in self._seats.values() if s.stream is not None and s.ready and not (
                idle and ((s.working and not self._left_over(s))
                          or any(o.outcome in (None, "lost") for o in s.orders)))]
        return [seat.node_id for seat in sorted(seats, key=lambda s: s.name)]

    def name_of(self, node: int) -> str:
        with self._changed:
            if node not in self._seats:
                raise ValueError(f"no client with node id {node} has joined; ids are those of get_node_ids()")
            return self._seats[node].name

    def push(self, orders: Collection[PendingRequest]) -> None:
        with self._changed:
            for order in orders:
                if order.plan.key in self._seats[order.node_id].asked:
                    raise ValueError(f"client {self._seats[order.node_id].name!r} was asked for round "
                                     f"{order.plan.round}, attempt {order.plan.attempt} before; raise the attempt, so "
                                     "that nobody trains twice for one order")
            for order in orders:
                seat = self._seats[order.node_id]
                seat.asked.add(order.plan.key)
                seat.orders.append(order)
                self._orders[order.message_id] = order
                if seat.stream is None:
                    order.outcome = "lost"
                self._dispatch(seat)
            self._new(None)

    def wait(self, message_ids: Collection[str], timeout_s: float) -> dict[str, Outcome]:
        with self._changed:
            self._changed.wait_for(lambda: self._news != self._seen, timeout_s)
            self._seen = self._news
            orders = {i: self._orders[i] for i in message_ids if i in self._orders}
            return {i: order.outcome for i, order in orders.items() if order.outcome is not None}

    def take(self, message_id: str) -> PendingRequest | None:
        """Forget an answered order and return it; None if it is not answered."""
        with self._changed:
            order = self._orders.get(message_id)
            if order is None or order.outcome in (None, "lost"):
                return None
            self._forget(order)
            return order

    def cancel(self, message_ids: Iterable[str]) -> list[PendingRequest]:
        """Forget the orders, telling clients that work on them to stop. Returns them."""
        with self._changed:
            orders = [self._orders[i] for i in message_ids if i in self._orders]
            for order in orders:
                self._forget(order)
                seat = self._seats[order.node_id]
                if seat.stream is not None and seat.working == order.plan.key:
                    seat.stream.cancel(order.plan.key)
            self._new(None)
            return orders

    def moved(self) -> tuple[int, int]:
        """Bytes up and down of all clients, also of those that are forgotten."""
        with self._changed:
            return (self._moved_before[0] + sum(seat.bytes_up for seat in self._seats.values()),
                    self._moved_before[1] + sum(seat.bytes_down for seat in self._seats.values()))

    def streams(self) -> list[ClientStream]:
        with self._changed:
            return [seat.stream for seat in self._seats.values() if seat.stream is not None]

    # Under the lock.

    def _seat(self, stream: ClientStream) -> _Seat | None:
        """The stream's seat, unless another stream has taken it over."""
        seat = self._seats.get(node_id(stream.name)) if stream.name else None
        return seat if seat is not None and seat.stream is stream else None

    def _check_name(self, join: pb.Join, seat: _Seat | None) -> None:
        """Raises Refused where a process that did not have the name last may not have it."""
        if seat is not None and seat.stream is not None:
            raise Refused("name-in-use", f"a client named {join.name!r} is connected; choose another --name, or stop "
                                         "the other client first. (One whose machine is gone is forgotten within "
                                         f"{wire.NOTICED_WITHIN_S} s.)")
        if self._names is not None and not self._names.may_have(join.name, join.secret):
            shown = "another secret than it was given" if join.secret else "no secret of it"
            raise Refused("name-in-use", f"{join.name!r} took part in this run before, and this client shows {shown}. "
                                         "Start it with the --state folder that the name was used with; if that is "
                                         "lost, the coordinator frees the name with `fedlora-server forget "
                                         f"{shlex.quote(join.name)} --out RUN_FOLDER`")

    def _forget_seats(self, gone: _Seat) -> None:
        """Keep what is remembered of clients that are away within its bound."""
        if gone.ready_at is None and not gone.asked:
            return self._forget_seat(gone)
        away = [seat for seat in self._seats.values() if seat.stream is None and not seat.asked]
        if len(away) > MOST_AWAY:
            first = min(away, key=lambda seat: seat.ready_s)
            self._forget_seat(first)
            if self._names is not None:
                self._names.forget(first.name)

    def _forget_seat(self, seat: _Seat) -> None:
        del self._seats[seat.node_id]
        self._moved_before[0] += seat.bytes_up
        self._moved_before[1] += seat.bytes_down

    def _left_over(self, seat: _Seat) -> bool:
        """Whether the client works on the round that an earlier server had begun."""
        return seat.working is not None and seat.working[1] == self._under_way and seat.working not in seat.asked

    def _dispatch(self, seat: _Seat) -> None:
        if seat.stream is None or not seat.ready or seat.working is not None:
            return
        order = next((order for order in seat.orders if order.outcome is None), None)
        if order is not None:
            seat.working = order.plan.key
            seat.stream.ask(order)

    def _vacate(self, seat: _Seat) -> None:
        if seat.stream is not None:
            seat.stream.close()
        if seat.ready:
            seat.ready_s += time.monotonic() - seat.ready_from
        seat.stream, seat.ready, seat.working = None, False, None
        for order in seat.orders:
            if order.outcome is None:
                order.outcome = "lost"

    def _forget(self, order: PendingRequest) -> None:
        del self._orders[order.message_id]
        self._seats[order.node_id].orders.remove(order)

    def _new(self, event: Event | None) -> None:
        self._news += 1
        self._changed.notify_all()
        if event is not None:
            self._notify(event)
