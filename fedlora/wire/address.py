"""Where plaintext may go: only to this machine itself, unless the user insists."""

from __future__ import annotations

import ipaddress


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
