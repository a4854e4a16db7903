"""The gRPC engine: a Flower `Grid` over FedLoRA's own wire, with persistent clients and an audited schema.

`client_registry` knows who was asked what, `registry_engine` checks what the strategy wants to send and gives replies
back lazily from the upload store, `grpc_session` speaks with one client, and this file binds the port.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from fedlora import wire
from fedlora.files import allow_open_files
from fedlora.plan import Proposal
from fedlora_strategies.messages import assume_identity

from .anchors import Anchors
from .client_registry import Event
from .grpc_session import GrpcSession
from .registry_engine import RegistryEngine

OTHER_FILES = 128
"""Open files beside each client's connection and upload, at most."""

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

    Args:
        address: host:port; port 0 takes a free one (see `address`).
        proposal: told to every client that joins.
        uploads: folder for uploads that wait to be aggregated; made if absent, emptied of them at the end.
        insecure: allow plaintext beyond this machine.
        max_clients: streams beyond this are turned away by gRPC (RESOURCE_EXHAUSTED).
        anchors: the file that keeps clients' anchors beyond this run; None forgets them with this process.
        notify, under_way: as of `RegistryEngine`.
    Raises:
        ValueError: the address is not one, is taken, or is not loopback and `insecure` is not set.
    """

    def __init__(self, address: str, proposal: Proposal, uploads: Path, *, insecure: bool = False,
                 max_clients: int = 512, notify: Callable[[Event], None] = lambda event: None,
                 under_way: int | None = None, anchors: Path | None = None) -> None:
        check_address(address, insecure=insecure)
        assume_identity(proposal.plan.run_id)
        wire.share_arenas()
        with contextlib.suppress(ValueError):  # it may never come to so many
            allow_open_files(2 * max_clients + OTHER_FILES)
        super().__init__(proposal, uploads, notify, under_way=under_way)
        self._sessions: set[GrpcSession] = set()
        self._anchors = Anchors(anchors)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(max_clients + 8, thread_name_prefix="fedlora-stream"),
                                   options=wire.SERVER_OPTIONS, maximum_concurrent_rpcs=max_clients)
        service, method = wire.SERVICE.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # frames as bytes: the session decodes them
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"{address.rpartition(':')[0]}:{self._bind(address)}"
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
        session = GrpcSession(self._registry, context, lambda: self._trained or {}, self._uploads, self._anchors)
        with self._lock:
            if self._closed.is_set():
                context.abort(grpc.StatusCode.UNAVAILABLE, "the server is closing")
            self._sessions.add(session)
        threading.Thread(target=self._read, args=(session, requests), name="fedlora-reader", daemon=True).start()
        return session.responses()

    def _read(self, session: GrpcSession, requests: Iterator[bytes]) -> None:
        try:
            session.read(requests)
        finally:
            with self._lock:
                self._sessions.discard(session)

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                sessions = list(self._sessions)
            for session in sessions:
                session.check_deadlines(time.monotonic())
