"""gRPC settings of both sides, and the rule for plaintext: only to this machine itself, unless the user insists."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os

from .tensors import MAX_FRAME_BYTES

KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 5, 30
"""Seconds of silence after which the other side is pinged, and seconds that it has to answer before it is given up.
A process that dies closes its socket, which is noticed at once; pings are for cut cables and sleeping machines. An
answer waits behind up to 5 MB in sockets and tunnels, which takes 20 s on a link of 250 kB/s."""
NOTICED_WITHIN_S = KEEPALIVE_S + KEEPALIVE_TIMEOUT_S
"""Seconds within which a lost connection is noticed."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # otherwise a minute, despite keepalive_timeout_ms
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy from the environment would send loopback's plaintext to another machine
    ("grpc.use_local_subchannel_pool", 1),  # a new channel connects at once, without the back-off of earlier ones
)
"""Options of both sides' channels. Pings are sent even if no call is open."""
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.so_reuseport", 0),  # by default a second server could bind the same port and take half of the clients
)
"""Options of the server."""
FRAME_PREFIX_BYTES = 5
"""Bytes that gRPC itself puts before each frame."""
JOIN_TIMEOUT_S = 10.0
"""Seconds within which the first frame of either side must come."""
STALL_TIMEOUT_S = 60.0
"""Seconds to wait for the next chunk of a transfer before it is given up."""

_M_ARENA_MAX = -8


def share_arenas(most: int = 2) -> None:
    """Limit glibc's memory arenas, so that the threads of this process reuse each other's memory.

    gRPC needs two threads a stream. By default glibc spreads them over eight arenas per core; each MiB that one thread
    frees then goes back to the kernel, while another thread's MiB is mapped and zeroed. This does nothing with another
    C library, or if the environment sets the number of arenas (MALLOC_ARENA_MAX).

    Args:
        most: the most arenas.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, most)


def is_loopback(address: str) -> bool:
    """Return whether an address, as host:port, names this machine itself.

    Raises:
        ValueError: the address is not of the form host:port.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"the address {address!r} is not of the form host:port, as in 127.0.0.1:9092")
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
