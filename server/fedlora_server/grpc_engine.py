"""The gRPC engine: a Flower `Grid` over FedLoRA's own wire, with persistent clients and an audited schema.

`roster` knows who was asked what, `grpc_session` speaks with one client, and this file binds the port, checks what the
strategy wants to send, and gives replies back lazily from the spool.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
from flwr.app import ArrayRecord, Message

from fedlora import wire
from fedlora.adapters import AdapterLayout
from fedlora.plan import Refusal, Tensors, Upload
from fedlora.wire import Setup, Shapes
from fedlora_strategies.messages import assign_id, assume_identity, read_train_message, reply

from .engine import Engine, Outcome
from .grpc_session import GrpcSession
from .roster import Event, Member, Order, Roster

CLOSE_TIMEOUT_S = 2.0
"""How long clients have to hear the goodbye."""


class GrpcEngine(Engine):
    """Listens from the moment it is made, until `close`.

    Args:
        address: host:port; port 0 takes a free one (see `address`).
        setup: told to every client that joins.
        spool: folder for uploads that wait to be aggregated; made if absent, emptied of them at the end.
        insecure: allow plaintext beyond this machine.
        max_clients: streams beyond this are turned away by gRPC (RESOURCE_EXHAUSTED).
        notify: called with each `Event`, from any thread; it must be quick.
    Raises:
        ValueError: the address is not one, is taken, or is not loopback and `insecure` is not set.
    """

    def __init__(self, address: str, setup: Setup, spool: Path, *, insecure: bool = False, max_clients: int = 512,
                 notify: Callable[[Event], None] = lambda event: None) -> None:
        if not wire.is_loopback(address) and not insecure:
            raise ValueError(f"{address} can be reached from other machines and the connection is not encrypted; "
                             "listen on 127.0.0.1 (through an SSH tunnel, say), or accept that with --insecure")
        assume_identity(setup.run_id)
        self._spool = spool
        self._roster = Roster(setup, notify)
        self._trained: Shapes | None = None
        self._shared: Shapes = {}
        self._sessions: set[GrpcSession] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(max_clients + 8, thread_name_prefix="fedlora-stream"),
                                   options=wire.SERVER_OPTIONS, maximum_concurrent_rpcs=max_clients)
        service, method = wire.SERVICE.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # frames as bytes: the session decodes them
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"{address.rpartition(':')[0]}:{self._bind(address)}"
        spool.mkdir(parents=True, exist_ok=True)
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

    def expect(self, layout: AdapterLayout) -> None:
        """Fix which tensors travel: before the first message, once the label set is known."""
        self._trained = {spec.name: tuple(spec.shape) for spec in layout.trained}
        self._shared = {spec.name: tuple(spec.shape) for spec in layout.shared}

    def members(self) -> list[Member]:
        """All clients that ever joined, in the order in which they became ready, with what each disclosed."""
        return self._roster.members()

    @property
    def bytes_up(self) -> int:
        return sum(member.bytes_up for member in self._roster.members())

    @property
    def bytes_down(self) -> int:
        return sum(member.bytes_down for member in self._roster.members())

    def name_of(self, node_id: int) -> str:
        return self._roster.name_of(node_id)

    def get_node_ids(self) -> list[int]:
        """Node ids of the clients that are connected and ready, sorted by name."""
        return self._roster.nodes(idle=False)

    def idle(self) -> list[int]:
        return self._roster.nodes(idle=True)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        decoded: dict[int, tuple[ArrayRecord, Tensors]] = {}  # messages of a round share their record
        orders = [self._order(message, decoded) for message in messages]
        self._roster.push(orders)
        return [order.message_id for order in orders]

    def _order(self, message: Message, decoded: dict[int, tuple[ArrayRecord, Tensors]]) -> Order:
        if self._trained is None:
            raise ValueError("the engine does not know the layout yet; call expect(layout) before the first message")
        plan, record = read_train_message(message)
        if plan.run.run_id != self._roster.setup.run_id:
            raise ValueError(f"the message is of run {plan.run.run_id}; this engine serves {self._roster.setup.run_id}")
        self._roster.name_of(message.metadata.dst_node_id)
        if id(record) not in decoded:
            decoded[id(record)] = record, _views(record)
        tensors = decoded[id(record)][1]
        known = {**self._trained, **self._shared}
        for name in {*tensors, *self._trained}:
            if name not in tensors or name not in known or tensors[name].shape != known[name]:
                shape = tensors[name].shape if name in tensors else "missing"
                raise ValueError(f"tensor {name} of the message is {shape}; the layout has {known.get(name, 'none')}")
            if tensors[name].dtype != np.float32:
                raise ValueError(f"tensor {name} of the message is {tensors[name].dtype}; only float32 travels")
        message_id = message.metadata.message_id or uuid.uuid4().hex
        assign_id(message, message_id)
        return Order(message_id, message, message.metadata.dst_node_id, plan, tensors)

    def wait(self, message_ids: Iterable[str], timeout_s: float) -> dict[str, Outcome]:
        return self._roster.wait(list(message_ids), timeout_s)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            order = self._roster.take(message_id)
            if order is None:
                continue
            if isinstance(order.outcome, Refusal):
                yield reply(order.outcome, order.message)
            elif order.stored is not None:
                values = np.fromfile(order.stored.path, "<f4")
                order.stored.path.unlink()
                tensors = wire.split(order.stored.shapes, values)
                yield reply(Upload(*order.plan.key, tensors=tensors, **order.stored.metrics), order.message)  # type: ignore[arg-type]

    def cancel(self, message_ids: Iterable[str]) -> None:
        for order in self._roster.cancel(message_ids):
            if order.stored is not None:
                order.stored.path.unlink(missing_ok=True)

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
        for left in self._spool.glob("*.upload"):
            left.unlink()
        with contextlib.suppress(OSError):  # it is the caller's folder and may hold more
            self._spool.rmdir()

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        session = GrpcSession(self._roster, context, lambda: self._trained or {}, self._spool)
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


def _views(record: ArrayRecord) -> Tensors:
    """The arrays of a record as views of its own bytes: a large state is not copied for sending it.

    Raises:
        ValueError: an array is not a plain float32 numpy array in C order.
    """
    tensors = {}
    for name, array in record.items():
        stream = BytesIO(array.data)
        try:
            plain = np.lib.format.read_magic(stream) == (1, 0) and array.stype == "numpy.ndarray"
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            if not plain or (fortran and len(shape) > 1) or dtype != np.dtype("<f4"):
                raise ValueError
            tensors[name] = np.frombuffer(array.data, dtype, offset=stream.tell()).reshape(shape)
        except ValueError:
            raise ValueError(f"array {name} of the message is not a float32 numpy array in C order; "
                             "only such arrays travel") from None
    return tensors
