"""The connected clients, what each was asked and what it answered: the state behind the gRPC and SuperLink engines.

One lock guards all of it. A client's name has one seat (`seats.Seat`), which outlasts the client's streams: when a
stream breaks, the same process may return on a new one, and is sent its unanswered orders again.

A name belongs to a client from its first Ready on. Afterwards only two can join under it: whoever shows the name's
secret (`names`), and the process that had the name last, which shows its process token. Either one takes over a stream
that is still open, since the machine at its other end may be gone.
"""

from __future__ import annotations

import hmac
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from fedlora import wire
from fedlora.plan import Proposal, Refusal, Refused
from fedlora.secure_sum.roster import Entry
from fedlora.wire import Key, pb

from .engine import Outcome, node_id
from .joining import check_join, check_name
from .label_sets import told_of
from .names import Names
from .observer import ClientEvent
from .seats import ClientStream, Member, PendingRequest, Question, Seat, Seats, Standing, kept_labels
from .upload_store import Stored

LOOK_S = 0.25
"""Seconds within which a stop is noticed while clients' answers are awaited."""


class Unasked(Refused):
    """Raised for an upload that this server never asked of the client: one of another run, or of an earlier server."""


class ClientRegistry:
    """The clients of a run. Any thread may call it.

    Args:
        proposal: what every client that joins is told, until `fix_labels`.
        notify: called with each `ClientEvent`, from any thread; it must return quickly.
        under_way: the round that an earlier server of this run had begun, if any. Clients that still work on it are
            left to it and count as idle, because the round will ask them for exactly that work.
        names: who owns each name; None where another party sees to that, as Flower's SuperLink does.
    """

    def __init__(self, proposal: Proposal, notify: Callable[[ClientEvent], None], *, under_way: int | None = None,
                 names: Names | None = None) -> None:
        self.proposal = proposal
        self._names = names
        self._notify = notify
        self._under_way = under_way
        self._changed = threading.Condition()
        self._news = self._seen = 0
        self._seats = Seats()
        self._orders: dict[str, PendingRequest] = {}

    # Called for a client's stream.

    def join(self, stream: ClientStream, join: pb.Join, told: Proposal | None = None,
             admit: Callable[[Standing, ClientStream | None], None] = lambda standing, replaced: None, *,
             proved: bool = False) -> Proposal:
        """Give the stream its name's seat, and the secret that will be the name's once the client is ready.

        Args:
            stream: the client's stream; its `name`, `process` and `secret` are set here.
            join: the client's first frame.
            told: the proposal that the client's process has already been told; None if it has been told none.
            admit: called with the client's standing and the stream that this one replaces. It raises an exception of
                any type if there is no place for the client.
            proved: whether a certificate has shown that the name is the client's, so that no secret is needed.

        Returns:
            The proposal to tell the client: the one that its process was told first, or the present one.

        Raises:
            Refused: version, privacy or name do not fit; `joining.Unproven` if the name's secret would help.
            WireError: the name, the process token or the secret is malformed.
        """
        theirs = check_join(join, self.proposal.plan)
        own = proved or (self._names is not None and self._names.is_own(join.name, join.secret))
        taken = not own and self._names is not None and not self._names.may_have(join.name, join.secret)
        with self._changed:
            node = node_id(join.name)
            seat = self._seats.get(node)
            again = seat is not None
            same = seat is not None and hmac.compare_digest(seat.process, join.process)
            if not own and not same:
                check_name(join, seat, taken)
            admit(max(seat.standing if seat is not None else Standing.NEW, Standing.KNOWN if own else Standing.NEW),
                  seat.stream if seat is not None else None)
            if seat is None:
                seat = Seat(join.name, node, join.process, theirs, join.private, told or self.proposal, time.time())
                self._seats.add(seat)
            elif seat.stream is not None:
                seat.vacate(None if same else Refusal("name-in-use", "another process came and proved that the name "
                                                                     "is its own"))
            if not same:
                seat.proposal = told or self.proposal
            if self._names is not None:
                seat.secret = join.secret or (seat.secret if same else b"") or secrets.token_bytes(wire.SECRET_BYTES)
            stream.name, stream.process, stream.secret = join.name, join.process, seat.secret
            seat.process, seat.version, seat.private = join.process, theirs, join.private
            seat.take(stream)
            self._new(_news_of(stream, "rejoined" if again else "joined"))
            return seat.proposal

    def ready(self, stream: ClientStream, labels: tuple[str, ...], working: Key | None,
              membership: tuple[Entry, float] | None = None) -> bool:
        """Record that the client has read its data and can be asked to train.

        Args:
            stream: the client's stream.
            labels: the label names that it announces; empty unless its proposal asked for them.
            working: the order that it still works on from an earlier stream, if any.
            membership: its entry in a roster and its noise (`Seat.membership`); None without secure aggregation.

        Returns:
            Whether the stream holds its name's seat. It does not if another stream has taken the seat over.

        Raises:
            Refused: it announces more label names than the server can hold.
            WireError: it announces labels without being asked, or is ready twice on one stream.
        """
        with self._changed:
            seat = self._seats.of_stream(stream)
            if seat is None:
                return False
            if labels and not seat.proposal.announce_labels:
                raise wire.WireError("labels were announced though nobody asked for them")
            if seat.ready:
                raise wire.WireError("a client is ready once on a stream")
            if self.proposal.announce_labels and not self._seats.has_room_for(labels):
                raise Refused("unavailable", f"{len(labels)} label names are more than the server remembers beside "
                                             "those of the other clients; the coordinator can name them with --labels")
            seat.labels = self._kept(labels) or seat.labels
            seat.membership = membership
            seat.begin(working)
            if (working is not None and working != seat.accepted and seat.order(working) is None
                    and not self._is_left_over(seat)):
                stream.cancel(working)
            seat.dispatch()
            self._new(_news_of(stream, "ready", told_of(labels)))
            return True

    def gone(self, stream: ClientStream, kind: str = "lost") -> None:
        """Record that the stream ended. The client's pending orders are lost until it returns.

        Args:
            stream: the client's stream.
            kind: kind of the event: "lost", or "left" if the client said that it leaves.
        """
        with self._changed:
            seat = self._seats.of_stream(stream)
            if seat is None:
                return
            seat.vacate()
            forgotten = self._seats.forget_beyond_bound(seat)
            self._new(_news_of(stream, kind))
        if forgotten is not None and self._names is not None:
            self._names.forget(forgotten)

    def expected(self, stream: ClientStream, key: Key) -> PendingRequest | None:
        """Return the order that an upload with this key would answer; None if that upload was accepted before.

        Raises:
            Refused: "too-late": no such order is open; `Unasked` if the client was never given it.
        """
        with self._changed:
            seat = self._seats.of_stream(stream)
            order = seat.order(key) if seat else None
            if seat and seat.accepted == key:
                return None
            if order is None or isinstance(order.outcome, Refusal):
                why = Refused if seat is None or seat.was_asked(key) else Unasked
                raise why("too-late", f"round {key[1]}, attempt {key[2]}")
            return order

    def answered(self, stream: ClientStream, key: Key, answer: Stored | Refusal | None,
                 acknowledge: Callable[[Refusal | None], None] = lambda late: None, *,
                 unasked: bool = False) -> Refusal | None:
        """Record that the client is done with an order, and send it the next one.

        Args:
            stream: the client's stream.
            key: the order's key.
            answer: the stored upload, or a refusal; None if an upload that had been accepted came again.
            acknowledge: called with the value returned here, before the client's next order is sent.
            unasked: whether `expected` refused it. It answers no order then, even if one was given since.

        Returns:
            Why the answer cannot be used, or None.
        """
        with self._changed:
            seat = self._seats.of_stream(stream)
            if seat is None:
                refusal = Refusal("too-late")
                acknowledge(refusal)
                return refusal
            late = seat.settle(key, None if unasked else answer) or unasked
            declined = Refusal("too-late", f"round {key[1]}, attempt {key[2]}") if late else None
            acknowledge(declined)
            seat.dispatch()
            event = None if answer is None else _news_of_answer(stream, key, answer)
            if event is not None and late:
                event = replace(event, kind="late") if seat.was_asked(key) else None
            self._new(event)
            return declined

    def told(self, stream: ClientStream, answer: pb.SumAnswer) -> None:
        """Take a client's answer to what it is asked for a secure sum. An answer that nobody awaits is dropped."""
        with self._changed:
            seat = self._seats.of_stream(stream)
            question = None if seat is None else seat.question
            if question is not None and question.answer is None and question.is_answered_by(answer):
                question.answer = answer
                self._new(None)

    def answers_in(self, stream: ClientStream) -> str:
        """Return the wire dtype of an upload that was accepted before and is dropped."""
        with self._changed:
            seat = self._seats.of_stream(stream)
            return (seat.answers_in if seat is not None else "") or self.proposal.plan.wire_dtype

    def declined(self, stream: ClientStream, refusal: Refusal) -> None:
        """Record that the client will not take part in the run at all."""
        with self._changed:
            self._new(_news_of(stream, "declined", str(refusal), refusal.code))

    def turned_away(self, stream: ClientStream, name: str, code: str, why: str) -> None:
        """Tell that a client may not join.

        Args:
            stream: the client's stream, which has no seat.
            name: what the client calls itself, made printable.
            code: the refusal's code (`ClientEvent.code`).
            why: the reason, in words.
        """
        self._notify(replace(_news_of(stream, "turned-away", why, code), name=name))

    def disconnected(self, stream: ClientStream, code: str, why: str) -> None:
        """Tell that the server ends a client's stream, with the code and the reason as in `turned_away`."""
        self._notify(_news_of(stream, "disconnected", why, code))

    def count(self, stream: ClientStream, up: int = 0, down: int = 0) -> None:
        """Add bytes that the stream received (`up`) and sent (`down`) to the client's totals."""
        seat = self._seats.named_by(stream)
        if seat is not None:
            with self._changed:
                seat.bytes_up += up
                seat.bytes_down += down

    # Called by the engine.

    def fix_labels(self, labels: tuple[str, ...]) -> None:
        """Tell this label set to the clients that join from now on, and ask them for no label names."""
        with self._changed:
            self.proposal = replace(self.proposal, plan=replace(self.proposal.plan, labels=labels))
            for seat in self._seats:
                seat.labels = self._kept(seat.labels)

    def members(self) -> list[Member]:
        """Return the remembered clients: those that were ready, in that order, then the others as they joined."""
        with self._changed:
            members = [seat.member for seat in self._seats]
        return sorted(members, key=lambda m: (m.ready_at or float("inf"), m.joined_at))

    def nodes(self, *, idle: bool) -> list[int]:
        """Return the connected and ready clients, sorted by name; with `idle` only those that have nothing to do.

        Each can be named and asked until the next `wait`, even if it leaves and is forgotten meanwhile.
        """
        with self._changed:
            seats = [s for s in self._seats if s.stream is not None and s.ready and not (
                idle and ((s.working and not self._is_left_over(s))
                          or any(o.outcome in (None, "lost") for o in s.orders)))]
            self._seats.hold(seats)
        return [seat.node_id for seat in sorted(seats, key=lambda s: s.name)]

    def name_of(self, node: int) -> str:
        """Return the name of a client.

        Raises:
            ValueError: no remembered client has this node id.
        """
        with self._changed:
            seat = self._seats.known(node)
            if seat is None:
                raise ValueError(f"no client with node id {node} has joined; ids are those of get_node_ids()")
            return seat.name

    def push(self, orders: Collection[PendingRequest]) -> None:
        """Send orders, each as soon as its client has nothing else to do. An absent client's order is "lost".

        Raises:
            ValueError: a client was asked for the same round and attempt before. No order is sent then.
        """
        with self._changed:
            for order in orders:
                seat = self._seats.recall(order.node_id)
                if seat.was_asked(order.plan.key):
                    raise ValueError(f"client {seat.name!r} was asked for round {order.plan.round}, attempt "
                                     f"{order.plan.attempt} before; raise the attempt, so that nobody trains twice for "
                                     "one order")
            for order in orders:
                seat = self._seats.recall(order.node_id)
                seat.give(order)
                self._orders[order.message_id] = order
                if seat.stream is None:
                    order.outcome = "lost"
                seat.dispatch()
            self._new(None)

    def memberships(self) -> dict[int, tuple[Entry, float]]:
        """Return the entry in a roster, and the noise, of each client that is connected and ready, by node id."""
        with self._changed:
            return {seat.node_id: seat.membership for seat in self._seats
                    if seat.stream is not None and seat.ready and seat.membership is not None}

    def confer(self, questions: Mapping[int, Question], timeout_s: float, stop: threading.Event, *,
               least: int, return_s: float) -> dict[int, pb.SumAnswer]:
        """Ask clients what a secure sum needs, and return the answers that have come; see `Engine.confer`."""
        until, alone_since = time.monotonic() + timeout_s, math.inf
        with self._changed:
            seats = {node: seat for node in questions if (seat := self._seats.known(node)) is not None}
            for node, seat in seats.items():
                seat.question = questions[node]
                seat.consult()
            try:
                while not stop.is_set() and (now := time.monotonic()) < until:
                    awaited = [seat for node, seat in seats.items()
                               if questions[node].answer is None and questions[node].is_for(seat.membership)]
                    there = any(seat.stream is not None and seat.ready for seat in awaited)
                    alone_since = math.inf if there else min(alone_since, now)
                    patience_s = 0.0 if len(seats) - len(awaited) >= least else return_s
                    if not awaited or now - alone_since >= patience_s:
                        break
                    self._changed.wait(min(until - now, LOOK_S))
            finally:
                for node, seat in seats.items():
                    if seat.question is questions[node]:
                        seat.question = None
            return {node: answer for node, question in questions.items() if (answer := question.answer) is not None}

    def wait(self, message_ids: Collection[str], timeout_s: float) -> dict[str, Outcome]:
        """Wait for news since the last call, then return the outcomes of these messages, without the pending ones."""
        with self._changed:
            self._seats.let_go()
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
        """Forget these orders and return them. Clients that work on one are told to stop."""
        with self._changed:
            orders = [self._orders[i] for i in message_ids if i in self._orders]
            for order in orders:
                seat = self._forget(order)
                if seat.stream is not None and seat.working == order.plan.key:
                    seat.stream.cancel(order.plan.key)
            self._new(None)
            return orders

    def moved(self) -> tuple[int, int]:
        """Return the bytes received from and sent to all clients, the forgotten ones included."""
        with self._changed:
            return self._seats.moved()

    def standing(self, stream: ClientStream) -> Standing:
        """Return how much the stream's client has done for the run."""
        with self._changed:
            seat = self._seats.of_stream(stream)
            return Standing.NEW if seat is None else seat.standing

    # To be called with the lock held.

    def _kept(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return labels if self.proposal.announce_labels else kept_labels(labels, self.proposal.plan.labels)

    def _is_left_over(self, seat: Seat) -> bool:
        """Return whether the client works on the round that an earlier server had begun."""
        return (seat.working is not None and seat.working[1] == self._under_way
                and not seat.was_asked(seat.working))

    def _forget(self, order: PendingRequest) -> Seat:
        del self._orders[order.message_id]
        seat = self._seats.recall(order.node_id)
        seat.orders.remove(order)
        return seat

    def _new(self, event: ClientEvent | None) -> None:
        self._news += 1
        self._changed.notify_all()
        if event is not None:
            self._notify(event)


def _news_of(stream: ClientStream, kind: str, detail: str = "", code: str = "") -> ClientEvent:
    return ClientEvent(kind, stream.name, detail, code, stream.came_from, stream.fingerprint)


def _news_of_answer(stream: ClientStream, key: Key, answer: Stored | Refusal) -> ClientEvent:
    event = (_news_of(stream, "refused", str(answer), answer.code) if isinstance(answer, Refusal) else
             replace(_news_of(stream, "uploaded"), sha256=answer.sha256, upload_bytes=answer.wire_bytes))
    return replace(event, round=key[1], attempt=key[2])
