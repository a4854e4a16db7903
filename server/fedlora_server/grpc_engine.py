"""The gRPC engine: the Flower `Grid` to which clients connect with FedLoRA's own protocol.

This file binds the port and decides which streams have a place. `client_registry` knows which client was asked what,
`registry_engine` checks what the strategy sends and reads replies from the upload store, and `grpc_session` speaks with
one client.
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
from typing_extensions import override

from fedlora import wire
from fedlora.plan import Proposal
from fedlora_strategies.messages import assume_identity

from .anchors import Anchors
from .connections import Room, Strangers
from .grpc_session import READY_TIMEOUT_S, GrpcSession, NoPlace
from .health import MOST_PROBES, Health
from .names import Names
from .observer import ClientEvent
from .registry_engine import RegistryEngine
from .seats import ClientStream, Standing
from .tls import ServerTls

log = logging.getLogger(__name__)

SPARE_STREAMS = 64
"""Streams allowed beyond the clients' places: those being ended, and those at the door. gRPC has a thread for each."""
MOST_AT_THE_DOOR = SPARE_STREAMS // 2
"""Largest number of streams "at the door": they have no place, and their Join will show whether they may have one."""

LOOK_EVERY_S = 0.5
"""Seconds between two looks for overdue streams and for connections without a client. A look takes milliseconds."""

TAKEN = "its place was needed for another client; join again"

CLOSE_TIMEOUT_S = 2.0
"""Seconds that clients have to receive the goodbye."""


def check_address(address: str, *, insecure: bool) -> None:
    """Check that the server may listen on an address.

    Raises:
        ValueError: it is not an address, or other machines can reach it and `insecure` is not set.
    """
    if not wire.is_loopback(address) and not insecure:
        raise ValueError(f"{address} can be reached from other machines and the connection is not encrypted; "
                         "give --tls DIR (fedlora-server pki init makes the folder), listen on 127.0.0.1 (through an "
                         "SSH tunnel, say), or accept that with --insecure")


class GrpcEngine(RegistryEngine):
    """An engine whose clients connect over gRPC. It listens from when it is made until `close`.

    Each client's stream holds one of a limited number of places. When all are taken, a new stream takes the place of
    one that is not ready: the oldest of the peer that has most. If all places belong to ready clients, a client with a
    higher `Standing` takes the place of one with the lowest, the latest of those; any other client is turned away. So
    strangers who do no more than say that they are ready can never keep out a client that was asked before, however
    many they are. A client that lost its place joins again by itself, and continues meanwhile what it does between Join
    and Ready.

    Creating an engine changes how this process allocates memory: its threads share arenas (`wire.share_arenas`).

    Args:
        address: host:port; port 0 takes a free one (see `address`).
        proposal: what every client that joins is told.
        uploads: folder for uploads that wait to be aggregated; made if absent, cleared of them at the end.
        insecure: allow plaintext connections from other machines.
        tls: the server's identity and the clients that may take part; None for plaintext.
        max_clients: largest number of clients at a time; fewer if the system allows too few open files (`Room`).
        notify: called with each `ClientEvent`, from any thread; it must return quickly.
        under_way: the round that an earlier server of this run had begun, if any (see `ClientRegistry`).
        anchors: file that keeps clients' anchors beyond this run; None keeps them in memory.
        names: folder that records who owns each name, from `keep_names` on, for a server that resumes the run; None
            keeps that in memory.
        ready_within_s: seconds from Join to Ready.

    Raises:
        ValueError: the address is malformed or taken, or other machines can reach it and `insecure` is not set.
    """

    masks = True

    def __init__(self, address: str, proposal: Proposal, uploads: Path, *, insecure: bool = False,
                 tls: ServerTls | None = None, max_clients: int = 512,
                 notify: Callable[[ClientEvent], None] = lambda event: None, under_way: int | None = None,
                 anchors: Path | None = None, names: Path | None = None,
                 ready_within_s: float = READY_TIMEOUT_S) -> None:
        check_address(address, insecure=insecure or tls is not None)
        self._tls = tls
        assume_identity(proposal.plan.run_id)
        wire.share_arenas()
        self._room, self._ready_within_s = Room.of(max_clients), ready_within_s
        self._names = Names(names)
        super().__init__(proposal, uploads, notify, under_way=under_way, names=self._names)
        self._sessions: set[GrpcSession] = set()
        self._anchors = Anchors(anchors)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        streams = self._room.clients + SPARE_STREAMS + MOST_PROBES
        self._server = grpc.server(ThreadPoolExecutor(streams + 8, thread_name_prefix="fedlora-stream"),
                                   options=(*wire.SERVER_OPTIONS, *self._room.options), maximum_concurrent_rpcs=streams)
        service, method = wire.SERVICE.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # frames as bytes: the session decodes them
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),
                                               Health(lambda: not self._closed.is_set()).handler()))
        port = self._bind(address)
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self._strangers = Strangers(port, self._room.strangers)
        uploads.mkdir(parents=True, exist_ok=True)
        self._server.start()
        threading.Thread(target=self._watch, name="fedlora-deadlines", daemon=True).start()

    def _bind(self, address: str) -> int:
        try:
            port: int = (self._server.add_insecure_port(address) if self._tls is None else
                         self._server.add_secure_port(address, self._tls.credentials()))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ValueError(f"cannot listen on {address}: port {address.rpartition(':')[2]} is taken by another "
                             "process, or the host is not this machine. Stop the other one, or choose another "
                             "--address") from None
        return port

    @override
    def keep_names(self) -> None:
        self._names.begin()

    @override
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
        session = GrpcSession(self._registry, context, lambda: self._layout, self._uploads, self._anchors,
                              self._names, self._admit, self._held_up, self._tls)
        with self._lock:
            if self._closed.is_set():
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server is closing")
            self._make_room(session)
            self._sessions.add(session)
        try:
            threading.Thread(target=self._read, args=(session, requests), name="fedlora-reader", daemon=True).start()
        except RuntimeError:  # the system allows no more threads
            with self._lock:
                self._sessions.discard(session)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the server has no thread left for this stream")
        return session.responses()

    def _make_room(self, session: GrpcSession) -> None:
        """Give a new stream a place, or put it at the door if ready clients hold them all. Called under the lock."""
        placed = self._placed()
        if len(placed) < self._room.clients or _end_one_of([other for other in placed if not other.is_ready]):
            return
        session.has_place = False
        waiting = [other for other in self._sessions if other.ended_at is None and not other.has_place]
        if len(waiting) >= MOST_AT_THE_DOOR:
            _end_one_of(waiting)

    def _admit(self, session: GrpcSession, standing: Standing, replaced: ClientStream | None) -> None:
        """Give a stream at the door a place, now that its Join has shown which client it is.

        Args:
            session: the client's stream.
            standing: how much the client has done for the run.
            replaced: the client's own earlier stream, whose place becomes free.

        Raises:
            NoPlace: no client with a place has done less for the run.
        """
        if session.has_place:  # as nearly all have: the registry is locked here, and counting places takes long
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
            except OSError as error:  # no descriptor was left for looking; gRPC's own limits still hold
                log.warning("The server could not check its connections: %s", error,
                            extra={"peer": "", "kind": "connections"})


def _end_one_of(waiting: Collection[GrpcSession]) -> bool:
    """End the oldest of these streams of the peer that has most. Return False if there is none."""
    if not waiting:
        return False
    of_peer = Counter(session.peer_group for session in waiting)
    most = max(of_peer.values())
    first = min((session for session in waiting if of_peer[session.peer_group] == most),
                key=lambda session: session.started_at)
    first.end(grpc.StatusCode.RESOURCE_EXHAUSTED, TAKEN)
    return True
