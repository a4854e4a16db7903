"""The TCP connections on a server's port: how many there may be, and which of them end when they are too many.

gRPC bounds them in all and ends those that never finish HTTP/2's greeting. It has no bound for one peer, and turns
everybody away while the bound is reached. So this process's own sockets are looked at now and then, from outside of
gRPC, and some that carry no client are shut down, the oldest of the peer with most first. One that carries a client is
never touched, however many clients share an address.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from fedlora import wire
from fedlora.files import open_files_allowed

log = logging.getLogger(__name__)

STRANGERS = 512
"""Connections beside those of clients, at most. Beyond half of them the oldest end, however young."""
STRANGERS_OF_A_PEER = 64
"""Of one peer, once they are older than `GRACE_S`: hundreds of clients behind one address may come at once."""
GRACE_S = 2.0
"""A Join is here within this, but over the slowest links."""
STRANGER_S = wire.JOIN_TIMEOUT_S + 5.0
"""Whoever has connected joins within this: the greeting and the Join have JOIN_TIMEOUT_S each, and overlap."""
RESERVED_FILES = 256
"""Open files beside connections and uploads: the model, checkpoints, logs and trackers need about 60."""
_OPEN_FILES = next((path for path in ("/proc/self/fd", "/dev/fd") if Path(path).is_dir()), "")


@dataclass(frozen=True)
class Room:
    """How much a server takes at a time: `clients` with an upload each, and `strangers`, all within its open files."""

    clients: int
    strangers: int

    @classmethod
    def of(cls, clients: int) -> Room:
        """For so many clients, or for as many as the system's limit on open files allows, which is said."""
        wanted = 2 * clients + STRANGERS + RESERVED_FILES
        if (allowed := open_files_allowed(wanted)) >= wanted:
            return cls(clients, STRANGERS)
        left = max(48, allowed - RESERVED_FILES)
        room = cls(min(clients, (left - left // 4) // 2), min(STRANGERS, left // 4))
        log.warning("This system allows %d open files, enough for %d clients and %d connections beside theirs; for "
                    "%d clients have the hard limit of `ulimit -n` raised to %d", allowed, room.clients,
                    room.strangers, clients, wanted)
        return room

    @property
    def connections(self) -> int:
        """Of clients and others together."""
        return self.clients + self.strangers

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """What gRPC itself is told."""
        return (("grpc.max_allowed_incoming_connections", self.connections),
                ("grpc.max_concurrent_streams", 1),  # a client opens a channel for each
                ("grpc.server_handshake_timeout_ms", int(wire.JOIN_TIMEOUT_S * 1000)),
                ("grpc.max_connection_idle_ms", int(STRANGER_S * 1000)))


class Peer(NamedTuple):
    """The other end of a connection."""

    host: str
    port: int

    @property
    def group(self) -> str:
        """Whom limits hold for: an address of IPv4, or the 64 bits of one of IPv6 that tell networks apart."""
        address = ipaddress.ip_address(self.host)
        return self.host if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def peer_of(name: str) -> Peer:
    """As gRPC names it: ipv4:192.0.2.1:4711 or ipv6:[2001:db8::1]:4711, percent-encoded."""
    _, _, address = unquote(name).partition(":")
    host, _, port = address.rpartition(":")
    return _peer(host.strip("[]"), int(port))


def _peer(host: str, port: int) -> Peer:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return Peer(str(mapped or address), port)


class Strangers:
    """Ends connections on `port` that carry no client, where they are too old or too many; see `surplus`.

    Args:
        most: of them at a time.
    """

    def __init__(self, port: int, most: int) -> None:
        self._port, self._most = port, most
        self._since: dict[Peer, float] = {}

    def end_surplus(self, clients: Collection[Peer], now: float) -> int:
        """Look once.

        Args:
            clients: the peers of all clients that have joined.
            now: seconds, of a clock that only goes on.

        Returns:
            How many were ended.
        """
        found = {peer: number for number in _open_files() if (peer := _peer_on(number, self._port)) is not None}
        self._since = {peer: self._since.get(peer, now) for peer in found if peer not in clients}
        ended = surplus(self._since, self._most, now)
        for peer in ended:
            _peer_on(found[peer], self._port, shut=peer)
        return len(ended)


def surplus(since: Mapping[Peer, float], most: int, now: float) -> list[Peer]:
    """Which strangers are to go, given since when each is one.

    All that are older than `STRANGER_S`; of each peer those beyond `STRANGERS_OF_A_PEER` that are older than
    `GRACE_S`; and beyond half of `most` whoever is the oldest of the peer that has most then.
    """
    of_peer: defaultdict[str, list[Peer]] = defaultdict(list)
    for peer in sorted(since, key=since.__getitem__, reverse=True):
        of_peer[peer.group].append(peer)  # the oldest last
    gone: list[Peer] = []
    for own in of_peer.values():
        while own and (now - since[own[-1]] > STRANGER_S
                       or (len(own) > STRANGERS_OF_A_PEER and now - since[own[-1]] > GRACE_S)):
            gone.append(own.pop())
    while len(since) - len(gone) > most // 2:
        gone.append(max(of_peer.values(), key=len).pop())
    return gone


def _open_files() -> list[int]:
    """Numbers of this process's; none where the system does not tell."""
    return [int(name) for name in os.listdir(_OPEN_FILES)] if _OPEN_FILES else []


def _peer_on(number: int, port: int, shut: Peer | None = None) -> Peer | None:
    """The other end of the open file with this number, if it is a connection whose own end is `port`.

    gRPC may close it, and open another under the number, at any time: a copy is looked at, which nobody else has.

    Args:
        shut: the connection is shut down if this is its other end.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):  # most are not: no need of a copy
            return None
        duplicate = os.dup(number)
    except OSError:  # it is closed by now
        return None
    try:
        with socket.socket(fileno=duplicate) as copy:
            duplicate = -1
            if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.getsockname()[1] != port:
                return None
            peer = _peer(*copy.getpeername()[:2])
            if peer == shut:
                copy.shutdown(socket.SHUT_RDWR)
            return peer
    except OSError:  # it listens, or the number is another file's by now
        return None
    finally:
        if duplicate >= 0:
            os.close(duplicate)
