"""A gRPC round without training, for 2, 32 and 256 client connections and 1 MB each way, against bare gRPC streams.

It is also measured for one client and 400 MB. Every client has a connection of its own; the clients of one process
share its Python interpreter.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory

import grpc

from fedlora import wire
from fedlora.adapters import AdapterLayout, TensorSpec, family_of
from fedlora.plan import Proposal, RoundPlan
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls
from fedlora_strategies.messages import to_record, train_messages

from ..federations import plan, tensors
from ..fresh import child_environment
from ..grpc_clients import RAW_OPTIONS
from ..measure import RATIO, Figure, Row, Settings, Times, Value, interleaved

PROCESSES = 8
"""Most client processes; each holds an equal share of the connections."""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each number of clients, and one for a large upload."""
    counts, size, large = ((1, 2), 1 << 12, 1 << 20) if settings.quick else ((2, 32, 256), 1 << 20, 400 << 20)
    reference = 0.0
    for clients in counts:
        times = _measured(clients, size, settings.repeats(max(3, 60 // clients)))
        each = [second / clients for second in times["FedLoRA"].wall]
        reference = reference or Value.of(each, "s").median
        yield Row(f"{clients} clients, {size / 2**20:.3g} MB", {
            "round": Value.of([1e3 * second for second in times["FedLoRA"].wall], "ms", better="lower",
                              target=15.0 if clients == counts[0] else None),
            "÷ raw gRPC": times["FedLoRA"].over(times["raw"]),
            "a client's share ÷ the first row's": Value.of([one / reference for one in each], RATIO, better="lower",
                                                           target=1.2),
            "raw": times["raw"].value("ms")})
    times = _measured(1, large, settings.repeats(5))
    yield Row(f"1 client, {large >> 20} MB", {
        "round": times["FedLoRA"].value("ms"), "÷ raw gRPC": times["FedLoRA"].over(times["raw"], target=2.0),
        "raw": times["raw"].value("ms")})


def _measured(clients: int, size: int, repeats: int) -> dict[str, Times]:
    with rounds_over_grpc(clients, size) as ours, _raw(clients, size) as raw:
        return interleaved({"FedLoRA": ours, "raw": raw}, repeats)


@contextlib.contextmanager
def rounds_over_grpc(clients: int, size: int, authority: Authority | None = None,
                     identities: Path | None = None) -> Iterator[Callable[[int], None]]:
    """Start a FedLoRA server and its clients; yield a function that runs one round.

    Every client is sent the tensors and sends them back. The replies are read from the upload store.

    Args:
        clients: number of clients.
        size: bytes of the tensors, each way.
        authority: the server's authority and list of clients, for mutual TLS; None for plaintext.
        identities: folder with a folder for each client, client-0 and so on, that holds its identity.
    """
    shape = (size // 32, 8)
    layout = AdapterLayout(family_of("frozen-a"), (), (TensorSpec("layer.B", shape),), ())
    run = plan("ffa-lora", "frozen-a", private=False)
    record = to_record(tensors(layout.trained, 0))
    number = 0

    def round_trip(block: int) -> None:
        nonlocal number
        number += 1
        order = RoundPlan(run, number, 0, wire.tensors_digest({}))
        ids = engine.push_messages(train_messages(order, ((node, record) for node in engine.idle())))
        while len(outcomes := engine.wait(ids, 1.0)) < clients:
            _check(processes)
        assert set(outcomes.values()) == {"uploaded"}
        assert sum(1 for _ in engine.pull_messages(ids)) == clients
        while len(engine.idle()) < clients:
            engine.wait([], 1.0)

    with TemporaryDirectory(prefix="fedlora-uploads-") as uploads:
        engine = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads),
                            tls=None if authority is None else ServerTls(authority.folder))
        engine.expect(layout)
        with _clients("fedlora", engine.address, clients, size, identities) as processes:
            while len(engine.idle()) < clients:
                engine.wait([], 1.0)
                _check(processes)
            yield round_trip
            engine.close("done")


@contextlib.contextmanager
def _raw(clients: int, size: int) -> Iterator[Callable[[int], None]]:
    """Start a bare gRPC server and its clients; yield a function that runs one round.

    Every client receives `size` bytes and sends as many back.
    """
    arrived: SimpleQueue[None] = SimpleQueue()
    turns: list[SimpleQueue[bool]] = []
    data, starts = bytes(size), range(0, size, wire.CHUNK_BYTES)

    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        mine: SimpleQueue[bool] = SimpleQueue()
        turns.append(mine)
        arrived.put(None)
        while mine.get():
            for start in starts:
                yield data[start:start + wire.CHUNK_BYTES]
            for _ in starts:
                next(requests)
            arrived.put(None)

    def round_trip(block: int) -> None:
        for turn in turns:
            turn.put(True)
        await_all()

    def await_all() -> None:
        for _ in range(clients):
            while True:
                try:
                    arrived.get(timeout=1.0)
                    break
                except Empty:
                    _check(processes)

    server = grpc.server(ThreadPoolExecutor(clients + 8), options=RAW_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", {"Echo": handler}),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with _clients("raw", address, clients, size) as processes:
        await_all()
        yield round_trip
        for turn in turns:
            turn.put(False)
    server.stop(0)


@contextlib.contextmanager
def _clients(kind: str, address: str, clients: int, size: int,
             identities: Path | None = None) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes that hold `clients` connections in all; they end when the server ends their streams."""
    processes = min(clients, PROCESSES)
    shares = [clients // processes + (i < clients % processes) for i in range(processes)]
    module = f"{__package__.rpartition('.')[0]}.grpc_clients"
    started = [subprocess.Popen([sys.executable, "-m", module, kind, address, str(share), str(size),
                                 str(sum(shares[:i])), *([] if identities is None else [str(identities)])],
                                env=child_environment()) for i, share in enumerate(shares)]
    try:
        yield started
        for process in started:
            process.wait(60)
    finally:
        for process in started:
            process.kill()


def _check(processes: list[subprocess.Popen[bytes]]) -> None:
    """Check that no client process has ended while the server waits for its clients."""
    if any(process.poll() is not None for process in processes):
        raise RuntimeError("a client process ended during the measurement; its messages are above")


FIGURE = Figure(5, measure)
