"""Who is there, who was asked what, and what came of it: the state behind the gRPC and the SuperLink engine.

One lock guards everything. A client keeps its seat, by name, over broken streams; a stream that comes back with the
same process token takes over, and orders that were not answered are given to it again. Once it was ready, nobody else
has the name: whoever comes back shows its secret (`names`), or the token of the process that had it last. Who shows the
secret takes over a stream that still stands, as one does whose other end is gone.

What strangers can have this remember is bounded. A client that leaves before it is ready is forgotten, and of those
that were ready, are away and were never asked for anything the `MOST_AWAY` are remembered that were ready for longest:
whoever would have a name forgotten keeps more clients than there are places ready for longer than its owner was.
"""

from __future__ import annotations

import hmac
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol

from flwr.app import Message

from fedlora import wire
from fedlora.plan import Proposal, Refusal, Refused, RoundPlan, Tensors
from fedlora.wire import Key, Repeats, pb

from .engine import Outcome, node_id
from .label_sets import FEW
from .names import Names
from .upload_store import Stored

MOST_AWAY = 1024
"""Seats of clients that were never asked for anything and are gone."""
MOST_LABELS_HELD = 100_000
"""Label names that clients have announced. Beyond it, one that announces more than `FEW` is not taken."""


@dataclass(frozen=True)
class Member:
    """A client as the operator sees it.

    Attributes:
        joined_at, ready_at: Unix time of the first Join, and of the first Ready or None.
        connected: whether its stream stands now. It can be asked to train if it is also ready.
        announced_labels: the label names that it disclosed. Of one that is away and was never asked the first `FEW`;
            once the label set is settled, those in it and the first `FEW` others.
        asked: whether it was asked for anything.
        bytes_up, bytes_down: moved over all its streams.
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


class Unproven(Refused):
    """The name is a client's own, and the Join does not show its secret: whoever has it is to show it now."""


class Standing(IntEnum):
    """What a client has done for the run, the least first: one that has done more may have the place of another."""

    NEW = 0
    KNOWN = 1  # was asked; or comes back and shows its name's secret
    UPLOADED = 2


class ClientStream(Protocol):
    """What the registry needs of a client's stream. The calls are made under the registry's lock and must be quick."""

    name: str
    process: bytes
    secret: bytes

    def ask(self, order: PendingRequest) -> None: ...
    def cancel(self, key: Key) -> None: ...
    def close(self, why: Refusal | None = None) -> None: ...


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
    secret: bytes = b""
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

    @property
    def standing(self) -> Standing:
        return Standing.UPLOADED if self.accepted else Standing.KNOWN if self.asked else Standing.NEW


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
        self._given: dict[int, _Seat] = {}  # by `nodes`, since the last `wait`: none of these is ever unknown
        self._orders: dict[str, PendingRequest] = {}
        self._moved_before = [0, 0]  # bytes up and down of seats that are forgotten

    # What the streams report.

    def join(self, stream: ClientStream, join: pb.Join, told: Proposal | None = None,
             admit: Callable[[Standing, ClientStream | None], None] = lambda standing, replaced: None) -> Proposal:
        """Give the stream its name's seat, and the secret that is the name's once it is ready.

        Args:
            told: what its process was told before; None where that is not known yet.
            admit: given what the client has done, and the stream that it takes over; it raises what it likes where
                there is no place.

        Returns:
            What it is to be told: what its process was told when it came first, or what new ones are told now.

        Raises:
            Refused: versions, privacy or names do not fit; `Unproven` where the name's secret would help.
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
        if len(join.secret) not in (0, wire.SECRET_BYTES):
            raise wire.WireError(f"the name's secret does not have {wire.SECRET_BYTES} bytes")
        if self.proposal.plan.private and not join.private:
            raise Refused("privacy-mismatch", "the server runs with --privacy required and this client with "
                                              "--epsilon inf; change one of the two flags")
        own = self._names is not None and self._names.is_own(join.name, join.secret)
        taken = not own and self._names is not None and not self._names.may_have(join.name, join.secret)
        with self._changed:
            node = node_id(join.name)
            seat = self._seats.get(node)
            again = seat is not None
            same = seat is not None and hmac.compare_digest(seat.process, join.process)
            if not own and not same:
                self._check_name(join, seat, taken)
            admit(max(seat.standing if seat is not None else Standing.NEW, Standing.KNOWN if own else Standing.NEW),
                  seat.stream if seat is not None else None)
            if seat is None:
                seat = _Seat(join.name, node, join.process, theirs, join.private, told or self.proposal, time.time())
                self._seats[node] = seat
            elif seat.stream is not None:
                self._vacate(seat, None if same else Refusal("name-in-use", "another process came and showed this "
                                                                            "name's secret"))
            if not same:
                seat.proposal = told or self.proposal
            if self._names is not None:
                seat.secret = join.secret or (seat.secret if same else b"") or secrets.token_bytes(wire.SECRET_BYTES)
            stream.name, stream.process, stream.secret = join.name, join.process, seat.secret
            seat.stream, seat.process, seat.version, seat.private = stream, join.process, theirs, join.private
            self._new(Event("rejoined" if again else "joined", seat.name))
            return seat.proposal

    def ready(self, stream: ClientStream, labels: tuple[str, ...], working: Key | None) -> bool:
        """The client has read its data; `working` names the request that it still has in hand, if any.

        Returns:
            Whether it has the seat; not if another stream has taken it over.

        Raises:
            Refused: it announced more label names than can be remembered.
        """
        with self._changed:
            seat = self._seat(stream)
            if seat is None:
                return False
            if labels and not seat.proposal.announce_labels:
                raise wire.WireError("labels were announced though nobody asked for them")
            if seat.ready:
                raise wire.WireError("a client is ready once on a stream")
            if self.proposal.announce_labels and len(labels) > FEW and (
                    len(labels) + sum(len(other.labels) for other in self._seats.values()) > MOST_LABELS_HELD):
                raise Refused("unavailable", f"{len(labels)} label names are more than the server remembers beside "
                                             "those of the other clients; the coordinator can name them with --labels")
            seat.ready, seat.ready_from = True, time.monotonic()
            seat.labels = self._remembered(labels) or seat.labels
            seat.ready_at = seat.ready_at or time.time()
            seat.working = working
            for order in seat.orders:
                if order.outcome == "lost":
                    order.outcome = None
            if (working is not None and working != seat.accepted and seat.order(working) is None
                    and not self._left_over(seat)):
                stream.cancel(working)
            self._dispatch(seat)
            self._new(Event("ready", seat.name, _disclosed(labels)))
            return True

    def gone(self, stream: ClientStream, kind: str = "lost") -> None:
        """The stream ended. What the client was asked is lost, until it comes back."""
        with self._changed:
            seat = self._seat(stream)
            if seat is None:
                return
            self._vacate(seat)
            forgotten = self._forget_seats(seat)
            self._new(Event(kind, seat.name))
        if forgotten is not None and self._names is not None:
            self._names.forget(forgotten)

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
            for seat in self._seats.values():
                seat.labels = self._remembered(seat.labels)

    def members(self) -> list[Member]:
        """All that became ready, in that order, and then those that have joined and are not; without those that are
        forgotten.
        """
        with self._changed:
            members = [Member(s.name, s.node_id, s.joined_at, s.ready_at, s.stream is not None, s.labels, bool(s.asked),
                              s.version, s.private, s.bytes_up, s.bytes_down) for s in self._seats.values()]
        return sorted(members, key=lambda m: (m.ready_at or float("inf"), m.joined_at))

    def nodes(self, *, idle: bool) -> list[int]:
        """Connected and ready clients, sorted by name; with `idle` only those that have nothing to do.

        Until the next `wait` each has a name and can be asked, whatever becomes of it meanwhile.
        """
        with self._changed:
            seats = [s for s in self._seats.values() if s.stream is not None and s.ready and not (
                idle and ((s.working and not self._left_over(s))
                          or any(o.outcome in (None, "lost") for o in s.orders)))]
            self._given.update((seat.node_id, seat) for seat in seats)
        return [seat.node_id for seat in sorted(seats, key=lambda s: s.name)]

    def name_of(self, node: int) -> str:
        with self._changed:
            seat = self._seats.get(node) or self._given.get(node)
            if seat is None:
                raise ValueError(f"no client with node id {node} has joined; ids are those of get_node_ids()")
            return seat.name

    def push(self, orders: Collection[PendingRequest]) -> None:
        with self._changed:
            for order in orders:
                if order.node_id not in self._seats:  # it left since its id was given, and was forgotten
                    self._remember_seat(self._given[order.node_id])
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
            self._given.clear()
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

    def standing(self, stream: ClientStream) -> Standing:
        """Of the client whose stream this is."""
        with self._changed:
            seat = self._seat(stream)
            return Standing.NEW if seat is None else seat.standing

    def streams(self) -> list[ClientStream]:
        with self._changed:
            return [seat.stream for seat in self._seats.values() if seat.stream is not None]

    # Under the lock.

    def _seat(self, stream: ClientStream) -> _Seat | None:
        """The stream's seat, unless another stream has taken it over."""
        seat = self._seats.get(node_id(stream.name)) if stream.name else None
        return seat if seat is not None and seat.stream is stream else None

    def _check_name(self, join: pb.Join, seat: _Seat | None, taken: bool) -> None:
        """Raises Refused where a process that did not have the name last, and shows no secret, may not have it."""
        why = Unproven if taken and not join.secret else Refused
        if seat is not None and seat.stream is not None:
            raise why("name-in-use", f"a client named {join.name!r} is connected; choose another --name, or stop the "
                                     "other client first. (One whose machine is gone is forgotten within "
                                     f"{wire.NOTICED_WITHIN_S} s.)")
        if taken:
            shown = "another secret than it was given" if join.secret else "no secret of it"
            raise why("name-in-use", f"{join.name!r} took part in this run before, and this client shows {shown}. "
                                     "Start it with the --state folder that the name was used with; if that is lost, "
                                     "the coordinator frees the name with `fedlora-server forget "
                                     f"{shlex.quote(join.name)} --out RUN_FOLDER`")

    def _forget_seats(self, gone: _Seat) -> str | None:
        """Keep what is remembered of clients that are away within its bound. Returns the name that is free now."""
        if gone.asked:
            return None
        if gone.ready_at is None:
            self._forget_seat(gone)
            return None
        away = [seat for seat in self._seats.values() if seat.stream is None and not seat.asked]
        if len(away) <= MOST_AWAY:
            return None
        first = min(away, key=lambda seat: seat.ready_s)
        self._forget_seat(first)
        return first.name

    def _forget_seat(self, seat: _Seat) -> None:
        del self._seats[seat.node_id]
        self._moved_before[0] += seat.bytes_up
        self._moved_before[1] += seat.bytes_down

    def _remember_seat(self, seat: _Seat) -> None:
        self._seats[seat.node_id] = seat
        self._moved_before[0] -= seat.bytes_up
        self._moved_before[1] -= seat.bytes_down

    def _remembered(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Of the label names that a client announced."""
        if self.proposal.announce_labels or len(labels) <= FEW:
            return labels
        settled = {label: label for label in self.proposal.plan.labels}  # one string, whoever announced it
        others = [label for label in labels if label not in settled][:FEW]
        return tuple(settled.get(label, label) for label in labels if label in settled or label in others)

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

    def _vacate(self, seat: _Seat, why: Refusal | None = None) -> None:
        if seat.stream is not None:
            seat.stream.close(why)
        if not seat.asked:
            seat.labels = seat.labels[:FEW]
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


def _disclosed(labels: tuple[str, ...]) -> str:
    """For the operator: a client decides how many they are, and not how long a line is."""
    if len(labels) <= 3:
        return f"discloses its label names {', '.join(labels)}" if labels else ""
    return f"discloses {len(labels)} label names: {', '.join(labels[:3])}, …"
