"""How both sides set up gRPC, and where plaintext may go: to this machine itself only, unless the user insists."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os

from .tensors import MAX_FRAME_BYTES

KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 5, 30
"""A side that says nothing is pinged after the first, and given up when the ping is not answered within the second.
A process that dies closes its socket, which is noticed at once; the pings are for cables and sleeping machines. Their
answers wait behind up to 5 MB that sockets and tunnels hold, which a link of 250 kB/s takes 20 s for."""
NOTICED_WITHIN_S = KEEPALIVE_S + KEEPALIVE_TIMEOUT_S

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),  # a minute by default, whatever keepalive_timeout says
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),  # http_proxy would have loopback's plaintext sent to another machine
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, without the back-off of the ones before
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.so_reuseport", 0),  # by default a second server may bind the same port, and takes half of the clients
)
FRAME_PREFIX_BYTES = 5
"""gRPC's own, before each frame."""
JOIN_TIMEOUT_S = 10.0
"""The first frame of either side must come within this."""
STALL_TIMEOUT_S = 60.0
"""A transfer whose next chunk does not come within this is given up."""

_M_ARENA_MAX = -8


def share_arenas(most: int = 2) -> None:
    """Have all threads of this process take their memory from few of glibc's arenas, so that they use it again.

    gRPC needs two threads a stream. Left alone, glibc deals them out among eight arenas a core, and each MiB that one
    frees goes back to the kernel while another's is mapped and zeroed. Elsewhere, and where the environment says how
    many there shall be (MALLOC_ARENA_MAX), nothing happens.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, most)


def is_loopback(address: str) -> bool:
    """Whether host:port names this machine itself.

    Raises:
        ValueError: it is not of the form host:port.
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
