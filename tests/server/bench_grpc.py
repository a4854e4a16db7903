"""Times of the transport beside raw gRPC. Prints, asserts nothing: `python -m tests.server.bench_grpc`.

    large   one 400 MB adapter to a client process and back, against the same bytes in the same chunks through a gRPC
            stream with no schema, no checks, no digest and nowhere to put them
    small   median of empty rounds: two client processes, 1 MB each way
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np

from fedlora import wire
from fedlora.adapters import FAMILIES, AdapterLayout, TensorSpec
from fedlora.plan import RoundPlan
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_strategies.messages import to_record, train_message
from tests.federation import plan_of
from tests.server.federated_clients import setup_of, start_client


def engine_round_trips(num_bytes: int, clients: int, rounds: int) -> Iterator[float]:
    """Yield the seconds of each round in which every client sends back what it was sent."""
    shape = (num_bytes // 32, 8)
    layout = AdapterLayout(FAMILIES["frozen-a"], 8, 1.0, (TensorSpec("q.B", shape, "adapter"),), ())
    run = plan_of("ffa-lora")
    record = to_record({"q.B": np.random.default_rng(0).standard_normal(shape, np.float32)})
    with tempfile.TemporaryDirectory() as spool:
        engine = GrpcEngine("127.0.0.1:0", setup_of(run), Path(spool))
        engine.expect(layout)
        processes = [start_client(engine.address, f"client-{i}", stdout=subprocess.DEVNULL) for i in range(clients)]
        for number in range(1, rounds + 1):
            while len(engine.idle()) < clients:
                engine.wait([], 1.0)
            order = RoundPlan(run, number, 0, wire.digest({}))
            begin = time.perf_counter()
            ids = engine.push_messages(train_message(order, record, node) for node in engine.idle())
            while len(engine.wait(ids, 1.0)) < clients:
                pass
            yield time.perf_counter() - begin
            engine.cancel(ids)
        engine.close("done")
        for process in processes:
            process.wait()


def raw_round_trips(num_bytes: int, rounds: int) -> Iterator[float]:
    """The same over bare gRPC: one client process, which counts the bytes and sends as many back."""
    arrived: SimpleQueue[None] = SimpleQueue()
    go: SimpleQueue[bool] = SimpleQueue()
    data = np.random.default_rng(0).bytes(num_bytes)
    starts = range(0, num_bytes, wire.CHUNK_BYTES)

    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        arrived.put(None)
        while go.get():
            for start in starts:
                yield data[start:start + wire.CHUNK_BYTES]
            for _ in starts:
                next(requests)
            arrived.put(None)

    server = grpc.server(ThreadPoolExecutor(2), options=wire.SERVER_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = subprocess.Popen([sys.executable, "-m", "tests.server.bench_grpc", "--bytes", str(num_bytes),
                               "--raw-client", f"127.0.0.1:{port}"])
    arrived.get()
    for _ in range(rounds):
        begin = time.perf_counter()
        go.put(True)
        arrived.get()
        yield time.perf_counter() - begin
    go.put(False)
    client.wait()
    server.stop(0)


def raw_client(address: str, num_bytes: int) -> None:
    data = np.random.default_rng(0).bytes(num_bytes)
    starts = range(0, num_bytes, wire.CHUNK_BYTES)
    turns: SimpleQueue[bool] = SimpleQueue()

    def requests() -> Iterator[bytes]:
        while turns.get():
            for start in starts:
                yield data[start:start + wire.CHUNK_BYTES]

    with grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS) as channel:
        for number, _ in enumerate(channel.stream_stream("/raw/Echo")(requests()), 1):
            if number % len(starts) == 0:
                turns.put(True)
        turns.put(False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, default=400 << 20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw-client")
    args = parser.parse_args()
    if args.raw_client:
        raw_client(args.raw_client, args.bytes)
        return
    turns = zip(raw_round_trips(args.bytes, args.rounds), engine_round_trips(args.bytes, 1, args.rounds), strict=True)
    raw, ours = zip(*turns, strict=True)  # interleaved: both see the same load
    print(f"{args.bytes >> 20} MiB there and back: raw gRPC {statistics.median(raw):.2f} s, FedLoRA "
          f"{statistics.median(ours):.2f} s, ratio {statistics.median(ours) / statistics.median(raw):.2f} "
          f"(raw {[round(s, 2) for s in raw]}, FedLoRA {[round(s, 2) for s in ours]})")
    small = list(engine_round_trips(1 << 20, 2, 50))
    print(f"empty round, two clients, 1 MiB: median {1e3 * statistics.median(small):.1f} ms, "
          f"worst {1e3 * max(small):.1f} ms")


if __name__ == "__main__":
    main()
