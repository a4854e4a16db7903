"""Limits on the TCP connections to the server's port, and which connections are ended when there are too many.

gRPC limits the total and ends connections that never finish the HTTP/2 handshake. It has no limit for a single peer,
and turns everybody away once the total is reached. So the server regularly looks at this process's own sockets, without
gRPC's help, and shuts down some that carry no client ("strangers"), beginning with the oldest one of the peer that has
most. A connection that carries a client is never touched, however many clients share an address.
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
"""Largest number of connections that carry no client. Beyond half of it the oldest are ended, at any age."""
STRANGERS_OF_A_PEER = 64
"""Largest number of one peer's strangers older than `GRACE_S`. Younger ones do not count, because hundreds of clients
behind one address may connect at the same moment."""
GRACE_S = 2.0
"""Seconds within which a Join arrives, except over the slowest links."""
STRANGER_S = wire.JOIN_TIMEOUT_S + 5.0
"""Seconds after which a connection without a client is ended. The handshake and the Join may take JOIN_TIMEOUT_S each,
but overlap."""
RESERVED_FILES = 256
"""Open files kept free for other uses: the model, checkpoints, logs and trackers need about 60."""
_OPEN_FILES = next((path for path in ("/proc/self/fd", "/dev/fd") if Path(path).is_dir()), "")


@dataclass(frozen=True)
class Room:
    """The number of connections that a server takes at a time, within its limit on open files.

    Attributes:
        clients: number of clients, each with a connection and an upload's file.
        strangers: number of connections that carry no client.
    """

    clients: int
    strangers: int

    @classmethod
    def of(cls, clients: int) -> Room:
        """Return room for this many clients. If the system allows fewer open files, log that and return what fits."""
        wanted = 2 * clients + STRANGERS + RESERVED_FILES
        if (allowed := open_files_allowed(wanted)) >= wanted:
            return cls(clients, STRANGERS)
        left = max(48, allowed - RESERVED_FILES)
        room = cls(min(clients, (left - left // 4) // 2), min(STRANGERS, left // 4))
        log.warning("This system allows %d open files, enough for %d clients and %d other connections. For %d clients, "
                    "have the hard limit of `ulimit -n` raised to %d", allowed, room.clients, room.strangers, clients,
                    wanted)
        return room

    @property
    def connections(self) -> int:
        """Number of connections in all."""
        return self.clients + self.strangers

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        """The options for gRPC's server that set the same limits there."""
        return (("grpc.max_allowed_incoming_connections", self.connections),
                ("grpc.max_concurrent_streams", 1),  # a client opens a channel for each stream
                ("grpc.server_handshake_timeout_ms", int(wire.JOIN_TIMEOUT_S * 1000)),
                ("grpc.max_connection_idle_ms", int(STRANGER_S * 1000)))


class Peer(NamedTuple):
    """The other end of a connection."""

    host: str
    port: int

    @property
    def group(self) -> str:
        """The address that limits apply to: an IPv4 address, or an IPv6 address's /64 network."""
        address = ipaddress.ip_address(self.host)
        return self.host if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def peer_of(name: str) -> Peer:
    """Parse gRPC's name of a peer: ipv4:192.0.2.1:4711 or ipv6:[2001:db8::1]:4711, percent-encoded."""
    _, _, address = unquote(name).partition(":")
    host, _, port = address.rpartition(":")
    return _peer(host.strip("[]"), int(port))


def _peer(host: str, port: int) -> Peer:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return Peer(str(mapped or address), port)


class Strangers:
    """The watch over connections that carry no client. It ends those that are too old or too many (see `surplus`).

    Args:
        port: the server's port.
        most: largest number of such connections at a time.
    """

    def __init__(self, port: int, most: int) -> None:
        self._port, self._most = port, most
        self._since: dict[Peer, float] = {}

    def end_surplus(self, clients: Collection[Peer], now: float) -> int:
        """Look at all connections once, and end the surplus ones.

        Args:
            clients: the peers of all clients that have joined.
            now: monotonic time in seconds.

        Returns:
            How many connections were ended.
        """
        found = {peer: number for number in _open_files() if (peer := _peer_on(number, self._port)) is not None}
        self._since = {peer: self._since.get(peer, now) for peer in found if peer not in clients}
        ended = surplus(self._since, self._most, now)
        for peer in ended:
            _peer_on(found[peer], self._port, shut=peer)
        return len(ended)


def surplus(since: Mapping[Peer, float], most: int, now: float) -> list[Peer]:
    """Return the strangers whose connections must end.

    These are all older than `STRANGER_S`; of each peer, those beyond `STRANGERS_OF_A_PEER` that are older than
    `GRACE_S`; and, while more than half of `most` are left, the oldest one of the peer that has most.

    Args:
        since: each stranger, and when it was first seen (monotonic seconds).
        most: largest number of strangers at a time.
        now: monotonic time in seconds.
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
    """Return this process's file descriptors; none if the system does not list them."""
    return [int(name) for name in os.listdir(_OPEN_FILES)] if _OPEN_FILES else []


def _peer_on(number: int, port: int, shut: Peer | None = None) -> Peer | None:
    """Return the peer of a file descriptor, if it is a connection to `port`.

    At any time gRPC may close the descriptor and open another file under its number. So a duplicate is looked at, which
    belongs to this function alone.

    Args:
        number: the file descriptor.
        port: the server's port.
        shut: if this is the connection's peer, the connection is shut down.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):  # most are not sockets and need no duplicate
            return None
        duplicate = os.dup(number)
    except OSError:  # closed in the meantime
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
    except OSError:  # a listening socket, or one that was closed in the meantime
        return None
    finally:
        if duplicate >= 0:
            os.close(duplicate)
