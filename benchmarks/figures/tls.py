"""A gRPC round over mutual TLS against the same in plaintext: seconds, bytes on the network, and joining.

The rounds are those of the figure `grpc`, with the same server and clients; those with and without TLS take turns. Both
ends of every connection are on this machine, so that encrypting and decrypting share its cores. Bytes are TCP's own
count of both directions. A client that joins over TLS shakes hands twice: once to check the server in words, once for
the stream.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from fedlora.identity import make_request
from fedlora.identity.folder import AUTHORITY, CERTIFICATE
from fedlora.plan import Proposal
from fedlora_client.connection import Connection
from fedlora_client.tls import Tls
from fedlora_server.grpc_engine import GrpcEngine
from fedlora_server.pki.authority import Authority
from fedlora_server.tls import ServerTls

from ..federations import plan
from ..measure import RATIO, Figure, Row, Settings, exactly, interleaved
from .grpc import rounds_over_grpc

_TCP_BYTES = 120
"""Where Linux's tcp_info has the bytes that were acknowledged and, after them, those that were received: 64 bits each.
"""


def measure(settings: Settings) -> Iterator[Row]:
    """Yield one row for each number of clients, one for a large upload, and one for joining."""
    cases = (((1, 1 << 12), (2, 1 << 20)) if settings.quick else
             ((2, 1 << 20), (32, 1 << 20), (256, 1 << 20), (1, 400 << 20)))
    with TemporaryDirectory(prefix="fedlora-bench-tls-") as folder:
        authority = Authority.create(Path(folder) / "pki", ["127.0.0.1"])
        for number in range(max(clients for clients, _ in cases)):
            enroll(authority, Path(folder) / f"client-{number}")
        for clients, size in cases:
            yield _rounds(clients, size, authority, Path(folder), settings)
        yield _joining(authority, Path(folder), settings)


def enroll(authority: Authority, folder: Path) -> None:
    """Make the identity of a client that is named as the folder, and have the authority sign it."""
    issued = authority.sign(make_request(folder, folder.name))
    (folder / CERTIFICATE).write_bytes(issued.pem)
    (folder / AUTHORITY).write_bytes((authority.folder / AUTHORITY).read_bytes())


def _rounds(clients: int, size: int, authority: Authority, identities: Path, settings: Settings) -> Row:
    with (rounds_over_grpc(clients, size) as plain,
          rounds_over_grpc(clients, size, authority, identities) as encrypted):
        times = interleaved({"plaintext": plain, "TLS": encrypted}, settings.repeats(max(5, 40 // clients)))
        moved = []
        for one_round in (plain, encrypted):
            before = tcp_bytes()
            one_round(0)
            moved.append(tcp_bytes() - before)
    return Row(f"{clients} clients, {size / 2**20:.3g} MB", {
        "÷ plaintext": times["TLS"].over(times["plaintext"]),
        "CPU ÷ plaintext, server": times["TLS"].cpu_over(times["plaintext"]),
        "bytes ÷ plaintext": exactly(round(moved[1] / moved[0], 4), RATIO, better="lower"),
        "TLS": times["TLS"].value("ms"), "plaintext": times["plaintext"].value("ms")})


def _joining(authority: Authority, identities: Path, settings: Settings) -> Row:
    run, own = plan("ffa-lora", "frozen-a", private=False), identities / "client-0"
    with TemporaryDirectory(prefix="fedlora-uploads-") as uploads:
        plain = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads) / "plain")
        encrypted = GrpcEngine("127.0.0.1:0", Proposal(run), Path(uploads) / "tls", tls=ServerTls(authority.folder))
        try:
            times = interleaved({"plaintext": lambda block: _join(plain.address, own.name, None),
                                 "TLS": lambda block: _join(encrypted.address, own.name, Tls(own))},
                                settings.repeats(30))
        finally:
            for engine in (plain, encrypted):
                engine.close("done")
    return Row("one client joins and leaves", {
        "÷ plaintext": times["TLS"].over(times["plaintext"]), "TLS": times["TLS"].value("ms"),
        "plaintext": times["plaintext"].value("ms")})


def _join(address: str, name: str, tls: Tls | None) -> None:
    connection = Connection(address, name, private=False, tls=tls)
    try:
        connection.join()
    finally:
        connection.leave()


def tcp_bytes() -> int:
    """Return the bytes that this process's TCP connections have sent and received so far; 0 where none tells."""
    total = 0
    for number in map(int, os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else ():
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
        except OSError:  # no TCP socket, or closed meanwhile
            continue
        if len(told) >= _TCP_BYTES + 16:
            total += sum(struct.unpack_from("QQ", told, _TCP_BYTES))
    return total


FIGURE = Figure(16, measure)
