"""The gRPC engine: a Flower `Grid` over FedLoRA's own wire, with persistent clients and an audited schema.

`client_registry` knows who was asked what, `registry_engine` checks what the strategy wants to send and gives replies
back lazily from the upload store, `grpc_session` speaks with one client, and this file binds the port.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from fedlora import wire
from fedlora.plan import Proposal
from fedlora_strategies.messages import assume_identity

from .anchors import Anchors
from .client_registry import Event
from .connections import Room, Strangers
from .grpc_session import READY_TIMEOUT_S, GrpcSession, NoPlace
from .names import Names
from .registry_engine import RegistryEngine
from .seats import ClientStream, Standing

log = logging.getLogger(__name__)

SPARE_STREAMS = 64
"""Streams that are just being ended, beside those of as many clients as may be. gRPC has a thread for each."""
MOST_AT_THE_DOOR = SPARE_STREAMS // 2
"""Streams that have no place, and whose Join is awaited to see whether they may have one."""

LOOK_EVERY_S = 0.5
"""For overdue streams and for connections that carry no client; a look takes milliseconds."""

TAKEN = "its place was needed for another client; join again"

CLOSE_TIMEOUT_S = 2.0
"""How long clients have to hear the goodbye."""


def check_address(address: str, *, insecure: bool) -> None:
    """Raises ValueError where `address` is not one, or is not loopback and `insecure` is not set."""
    if not wire.is_loopback(address) and not insecure:
        raise ValueError(f"{address} can be reached from other machines and the connection is not encrypted; "
                         "listen on 127.0.0.1 (through an SSH tunnel, say), or accept that with --insecure")


class GrpcEngine(RegistryEngine):
    """Listens from the moment it is made, until `close`. This process' threads share memory from then on
    (`wire.share_arenas`).

    While all places are taken, whoever comes takes that of a stream that is not ready: the oldest one of the peer with
    most. Where all are ready, a client that has done more for the run (`Standing`) takes the place of one that has done
    least, the latest of them, and any other is turned away. So those who only say that they are ready, however many,
    keep out nobody who was asked before. A client whose place was taken comes back by itself, and what it does between
    Join and Ready goes on meanwhile.

    Args:
        address: host:port; port 0 takes a free one (see `address`).
        proposal: told to every client that joins.
        uploads: folder for uploads that wait to be aggregated; made if absent, emptied of them at the end.
        insecure: allow plaintext beyond this machine.
        max_clients: at a time; fewer where the system does not allow as many open files (`Room`).
        names: folder that keeps whose names are taken, for a server that takes the run up again, once
            `keep_names` was called; None forgets them with this process.
        ready_within_s: from Join to Ready.
        anchors: the file that keeps clients' anchors beyond this run; None forgets them with this process.
        notify, under_way: as of `RegistryEngine`.

    Raises:
        ValueError: the address is not one, is taken, or is not loopback and `insecure` is not set.
    """

    def __init__(self, address: str, proposal: Proposal, uploads: Path, *, insecure: bool = False,
                 max_clients: int = 512, notify: Callable[[Event], None] = lambda event: None,
                 under_way: int | None = None, anchors: Path | None = None, names: Path | None = None,
                 ready_within_s: float = READY_TIMEOUT_S) -> None:
        check_address(address, insecure=insecure)
        assume_identity(proposal.plan.run_id)
        wire.share_arenas()
        self._room, self._ready_within_s = Room.of(max_clients), ready_within_s
        self._names = Names(names)
        super().__init__(proposal, uploads, notify, under_way=under_way, names=self._names)
        self._sessions: set[GrpcSession] = set()
        self._anchors = Anchors(anchors)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        streams = self._room.clients + SPARE_STREAMS
        self._server = grpc.server(ThreadPoolExecutor(streams + 8, thread_name_prefix="fedlora-stream"),
                                   options=(*wire.SERVER_OPTIONS, *self._room.options), maximum_concurrent_rpcs=streams)
        service, method = wire.SERVICE.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # frames as bytes: the session decodes them
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = self._bind(address)
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._strangers = Strangers(port, self._room.strangers)
        uploads.mkdir(parents=True, exist_ok=True)
        self._server.start()
        threading.Thread(target=self._watch, name="fedlora-deadlines", daemon=True).start()

    def _bind(self, address: str) -> int:
        try:
            port = self._server.add_insecure_port(address)  # TLS: add_secure_port with credentials
        except RuntimeError:
            port = 0
        if port == 0:
            raise ValueError(f"cannot listen on {address}: port {address.rpartition(':')[2]} is taken by another "
                             "process, or the host is not this machine. Stop the other one, or choose another "
                             "--address") from None
        return port

    def keep_names(self) -> None:
        self._names.begin()

    def close(self, reason: str) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.goodbye(reason)
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while self._sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        self._server.stop(grace=0.5).wait()
        self._anchors.close()
        self._clear_uploads()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        session = GrpcSession(self._registry, context, lambda: self._trained or {}, self._uploads, self._anchors,
                              self._names, self._admit, self._held_up)
        with self._lock:
            if self._closed.is_set():
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server is closing")
            self._make_room(session)
            self._sessions.add(session)
        try:
            threading.Thread(target=self._read, args=(session, requests), name="fedlora-reader", daemon=True).start()
        except RuntimeError:  # the system allows no further thread
            with self._lock:
                self._sessions.discard(session)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server has no thread left for this stream")
        return session.responses()

    def _make_room(self, session: GrpcSession) -> None:
        """For one more stream, under the lock: a place, or where all are those of ready clients one at the door."""
        placed = self._placed()
        if len(placed) < self._room.clients or _end_one_of([other for other in placed if not other.is_ready]):
            return
        session.has_place = False
        waiting = [other for other in self._sessions if other.ended_at is None and not other.has_place]
        if len(waiting) >= MOST_AT_THE_DOOR:
            _end_one_of(waiting)

    def _admit(self, session: GrpcSession, standing: Standing, replaced: ClientStream | None) -> None:
        """Give a stream at the door a place, now that it is known whose it is.

        Raises:
            NoPlace: no client has done less for the run.
        """
        if session.has_place:  # nearly all: the registry waits for this
            return
        with self._lock:
            placed = [other for other in self._placed() if other is not replaced]
            if len(placed) >= self._room.clients and not _end_one_of(
                    [other for other in placed if not other.is_ready]):
                last = min(placed, key=lambda other: (self._registry.standing(other), -other.started_at))
                if self._registry.standing(last) >= standing:
                    raise NoPlace(f"the server has {self._room.clients} clients that are ready, as many as it takes")
                last.end(grpc.StatusCode.RESOURCE_EXHAUSTED, TAKEN)
            session.has_place = True

    def _placed(self) -> list[GrpcSession]:
        return [session for session in self._sessions if session.ended_at is None and session.has_place]

    def _read(self, session: GrpcSession, requests: Iterator[bytes]) -> None:
        try:
            session.read(requests)
        finally:
            with self._lock:
                self._sessions.discard(session)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            with self._lock:
                sessions = list(self._sessions)
            now = time.monotonic()
            for session in sessions:
                session.check_deadlines(now, self._ready_within_s)
            try:
                self._strangers.end_surplus({session.peer for session in sessions if session.name}, now)
            except OSError as error:  # no file could be opened to look; gRPC's own bounds hold
                log.warning("The connections could not be looked at: %s", error,
                            extra={"peer": "", "kind": "connections"})


def _end_one_of(waiting: Collection[GrpcSession]) -> bool:
    """The oldest of the peer that has most. False where there is none."""
    if not waiting:
        return False
    of_peer = Counter(session.peer_group for session in waiting)
    most = max(of_peer.values())
    first = min((session for session in waiting if of_peer[session.peer_group] == most),
                key=lambda session: session.started_at)
    first.end(grpc.StatusCode.RESOURCE_EXHAUSTED, TAKEN)
    return True
