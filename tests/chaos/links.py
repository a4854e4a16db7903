"""Links between clients and a server that can be cut, slowed, or made to lose packets: a relay between TUN devices.

Each client has a network of its own (a network namespace), and so has the server. A TUN device in either is all that
leads out of it; this process reads the IP packets of one device and writes them to the other, late, or not at all. So
the processes under test have real TCP with its retransmissions, and the kernel needs no netem.

Server: 10.77.0.1 in its namespace, a device for each client. Clients: 10.77.0.2, 10.77.0.3, …
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.chaos import namespaces
from tests.chaos.keepers import Keeper

SERVER = "10.77.0.1"
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUN_NO_PI = 0x400454CA, 0x1001
_SET_ADDRESS, _SET_PEER, _SET_FLAGS, _UP_AND_RUNNING = 0x8916, 0x8918, 0x8914, 0x41
MOST_WAITING = 256
"""Packets that wait in each direction of a link; further ones are dropped, as a router would."""


@dataclass(frozen=True)
class Link:
    """The state of a link.

    Attributes:
        delay_s: seconds that each packet takes, in either direction.
        loss: share of packets that are lost.
        bytes_per_s: rate in either direction; 0 for no limit.
        up: whether packets of the client arrive.
        down: whether packets of the server arrive.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0
    up: bool = True
    down: bool = True


GOOD, CUT = Link(), Link(up=False, down=False)
NO_ANSWER, NO_REQUEST = Link(down=False), Link(up=False)


@dataclass
class _Way:
    """One direction of a link: packets read from `source` go to `sink`."""

    source: int
    sink: int
    up: bool
    link: Link = GOOD
    free_at: float = 0.0
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)
    disturbed: int = 0


def why_none() -> str:
    """Return why there can be no such links; "" if there can be."""
    if not _TUN.exists():
        return f"{_TUN} is missing: this machine has no TUN devices"
    return namespaces.why_none(namespaces.NETWORK)


class Links:
    """The networks of a server and its clients, held by a process of their own.

    Args:
        clients: the clients' names.
        seed: decides which packets are lost.

    Attributes:
        networks: name ("server", or a client's) → the namespace's file, for `namespaces.enter`.
    """

    def __init__(self, clients: Sequence[str], seed: int = 0) -> None:
        self._relay = Keeper(_relay, tuple(clients), seed)
        self.networks: Mapping[str, str] = self._relay.first
        self.close = self._relay.close

    def set(self, client: str, link: Link) -> int:
        """Change the state of a client's link. Return how many packets the state before had disturbed."""
        disturbed: int = self._relay.ask((client, link))
        return disturbed

    def disturbed(self, client: str) -> int:
        """Return how many packets were lost, delayed or held back since the link's state changed last."""
        disturbed: int = self._relay.ask((client, None))
        return disturbed


def _relay(pipe: Connection, clients: Sequence[str], seed: int) -> Iterator[Any]:
    networks, ways = _networks(clients)
    yield networks
    chance, number = random.Random(seed), 0
    by_source = {way.source: way for pair in ways.values() for way in pair}
    while True:
        now = time.monotonic()
        due = min((way.waiting[0][0] for way in by_source.values() if way.waiting), default=now + 60)
        ready, _, _ = select.select([pipe, *by_source], [], [], max(0.0, due - now))
        if pipe in ready:
            try:
                client, link = pipe.recv()
            except EOFError:
                return
            yield _changed(ways[client], link)
        now = time.monotonic()
        for source in ready:
            if source is not pipe:
                number = _take(by_source[source], chance, number, now)
        for way in by_source.values():
            while way.waiting and way.waiting[0][0] <= now:
                _write(way.sink, heapq.heappop(way.waiting)[2])


def _changed(ways: tuple[_Way, _Way], link: Link | None) -> int:
    """Change a link's state if one is given. Return how many packets the state of before had disturbed."""
    disturbed = sum(way.disturbed for way in ways)
    if link is not None:
        for way in ways:
            if way.link.bytes_per_s and not link.bytes_per_s:
                way.waiting.clear()  # they would arrive in hours
            way.link, way.free_at, way.disturbed = link, 0.0, 0
    return disturbed


def _take(way: _Way, chance: random.Random, number: int, now: float) -> int:
    """Take all packets that a device has; let each wait for its time, or drop it. Return the last packet's number."""
    link = way.link
    while True:
        try:
            packet = os.read(way.source, 65536)
        except BlockingIOError:
            return number
        passes = link.up if way.up else link.down
        if not passes or (link.loss and chance.random() < link.loss) or len(way.waiting) >= MOST_WAITING:
            way.disturbed += 1
            continue
        due = now + link.delay_s
        if link.bytes_per_s:
            way.free_at = max(now, way.free_at) + len(packet) / link.bytes_per_s
            due += way.free_at - now
        if due == now and not way.waiting:
            _write(way.sink, packet)
            continue
        way.disturbed += due > now
        number += 1
        heapq.heappush(way.waiting, (due, number, packet))


def _write(sink: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # the device's queue is full: a lost packet
        os.write(sink, packet)


def _networks(clients: Sequence[str]) -> tuple[dict[str, str], dict[str, tuple[_Way, _Way]]]:
    """Make the namespaces and devices. Return the namespaces' files, and both ways of each client's link."""
    own, networks, at_server, ways = os.getpid(), {}, {}, {}

    def network(name: str) -> None:
        namespaces.unshare(namespaces.NETWORK)
        held = os.open("/proc/self/ns/net", os.O_RDONLY)  # stays open: it keeps the namespace
        networks[name] = f"/proc/{own}/fd/{held}"
        _set("lo", [(_SET_FLAGS, struct.pack("h", _UP_AND_RUNNING))])

    network("server")
    for number, client in enumerate(clients):
        at_server[client] = _device(f"tun{number}", SERVER, f"10.77.0.{number + 2}")
    for number, client in enumerate(clients):
        network(client)
        device = _device("tun0", f"10.77.0.{number + 2}", SERVER)
        ways[client] = (_Way(device, at_server[client], up=True), _Way(at_server[client], device, up=False))
    return networks, ways


def _device(name: str, address: str, peer: str) -> int:
    """Make a TUN device in this process's network, and return its descriptor."""
    device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_NO_PI))
    _set(name, [(_SET_ADDRESS, _address(address)), (_SET_PEER, _address(peer)),
                (_SET_FLAGS, struct.pack("h", _UP_AND_RUNNING))])
    return device


def _set(name: str, requests: Sequence[tuple[int, bytes]]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for request, value in requests:
            fcntl.ioctl(asking, request, struct.pack("16s24s", name.encode(), value))


def _address(address: str) -> bytes:
    return struct.pack("hH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
