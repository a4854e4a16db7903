"""The attacks of `tests.attacks --tls` on the handshake of a server, by machines that have no certificate."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time

from tests.attackers import MOST_IDLE, Attack, Target, _hold


def client_hello() -> bytes:
    """Return the first bytes of a client of TLS 1.3 that trusts everybody and has no certificate."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        _trusting().wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def _trusting() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def garbage_in_place_of_a_handshake(target: Target) -> None:
    """Send random bytes on connection after connection, some of them after a whole or changed ClientHello."""
    choice = random.Random(0)
    while target.goes_on():
        hello = bytearray(client_hello()) if choice.random() < 0.7 else bytearray()
        for _ in range(choice.randrange(6) if hello else 0):
            hello[choice.randrange(len(hello))] ^= 1 << choice.randrange(8)
        with contextlib.suppress(OSError), target.connect() as one:
            one.sendall(bytes(hello) + choice.randbytes(choice.randrange(0, 4096)))
        time.sleep(0.002)  # without a pause this machine runs out of ports


def truncated_client_hellos(target: Target) -> None:
    """Hold 1,300 connections that each send a part of a ClientHello, every third one byte by byte."""
    choice = random.Random(0)

    def opened() -> socket.socket:
        one, hello = target.connect(), client_hello()
        part = hello[:choice.randrange(1, len(hello))]
        for piece in (part[i:i + 1] for i in range(min(20, len(part)))) if choice.random() < 0.3 else (part,):
            one.sendall(piece)
        return one

    _hold(target, MOST_IDLE, opened)


def handshakes_kept_half_open(target: Target) -> None:
    """Hold 1,300 connections that send a whole ClientHello and never answer the server's part of the handshake."""
    def opened() -> socket.socket:
        one = target.connect()
        one.sendall(client_hello())
        return one

    _hold(target, MOST_IDLE, opened)


def handshakes_without_a_certificate(target: Target) -> None:
    """Go through the whole handshake again and again, which costs the server a signature each, and show nothing."""
    context = _trusting()
    while target.goes_on():
        with (contextlib.suppress(OSError), target.connect() as plain, context.wrap_socket(plain) as encrypted):
            encrypted.settimeout(5)
            target.count("LET IN", bool(encrypted.recv(1)))
        time.sleep(0.002)


TLS_ATTACKS = (
    Attack(garbage_in_place_of_a_handshake, over_tls=True),
    Attack(truncated_client_hellos, comes_first=True, files=1024, over_tls=True),
    Attack(handshakes_kept_half_open, comes_first=True, files=1024, over_tls=True),
    Attack(handshakes_without_a_certificate, over_tls=True))
