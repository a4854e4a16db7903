"""A process of gRPC clients that train nothing: `python -m … fedlora|raw ADDRESS CLIENTS BYTES FIRST [FOLDER]`.

    fedlora  each client takes part as fedlora-client does and sends back what it received
    raw      each client receives BYTES and sends as many back: no schema, no checks, nothing stored

With a further argument FOLDER, a fedlora client has mutual TLS and the identity in FOLDER/NAME.

Every client has a connection of its own; FIRST is the number of the first one. Flower and torch are not imported.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc

from fedlora import wire
from fedlora.plan import Released, Upload
from fedlora_client.connection import Connection, Goodbye
from fedlora_client.tls import Tls

RAW_OPTIONS = (("grpc.max_receive_message_length", wire.MAX_FRAME_BYTES),
               ("grpc.max_send_message_length", wire.MAX_FRAME_BYTES), ("grpc.use_local_subchannel_pool", 1))


def echo(address: str, name: str, size: int, identities: Path | None) -> None:
    """Run one FedLoRA client until the server says goodbye; `size` is not used."""
    connection = Connection(address, name, private=False, connect_timeout_s=300.0,
                            tls=None if identities is None else Tls(identities / name))
    try:
        connection.join()
        connection.ready()
        while True:
            plan, tensors = connection.next_request()
            connection.send(Upload(*plan.key, tensors=Released(tensors), steps=1))
    except Goodbye:
        return


def raw(address: str, name: str, size: int, identities: Path | None) -> None:
    """Run one bare gRPC stream, which sends `size` bytes in FedLoRA's chunks each turn, until the server ends it.

    `identities` is not used.
    """
    data, starts = bytes(size), range(0, size, wire.CHUNK_BYTES)
    turns: SimpleQueue[bool] = SimpleQueue()

    def requests() -> Iterator[bytes]:
        while turns.get():
            for start in starts:
                yield data[start:start + wire.CHUNK_BYTES]

    with grpc.insecure_channel(address, options=RAW_OPTIONS) as channel:
        try:
            for number, _ in enumerate(channel.stream_stream("/raw/Echo")(requests(), wait_for_ready=True), 1):
                if number % len(starts) == 0:
                    turns.put(True)
        except grpc.RpcError as error:
            print(f"{name}, a bare stream: {error.code().name.lower()}", file=sys.stderr)
            os._exit(1)
        turns.put(False)


def main(kind: str, address: str, clients: str, size: str, first: str, identities: str = "") -> None:
    """Run `clients` clients of one kind, each in a thread, until all have ended."""
    wire.share_arenas()
    behaviour: Callable[[str, str, int, Path | None], None] = {"fedlora": echo, "raw": raw}[kind]
    folder = Path(identities) if identities else None
    threads = [threading.Thread(target=behaviour, args=(address, f"client-{int(first) + i}", int(size), folder))
               for i in range(int(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # as fedlora-client does
