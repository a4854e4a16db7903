"""A TCP link between a real client and a real server that a test can cut, restore or mute."""

from __future__ import annotations

import contextlib
import math
import socket
import threading


class TcpProxy:
    """A proxy that forwards connections to `address` on to `target` (host:port).

    Attributes:
        bytes_up: bytes received from the client.
        bytes_down: bytes received from the server.
        swallowed_up: bytes of the client that were dropped.
    """

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[0], int(target.rpartition(":")[2])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._open, self._mute_down, self._mute_up_from = True, False, math.inf
        self.bytes_up = self.bytes_down = self.swallowed_up = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Close all connections, and every new one at once."""
        self._open = False
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._pairs.clear()

    def restore(self) -> None:
        """Forward again, in both directions."""
        self._open, self._mute_down, self._mute_up_from = True, False, math.inf

    def mute_downlink(self) -> None:
        """Drop all that the server sends."""
        self._mute_down = True

    def mute_uplink_after(self, bytes_down: int) -> None:
        """Drop all that the client sends once it has received `bytes_down` further bytes."""
        self._mute_up_from = self.bytes_down + bytes_down

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._open:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:  # nobody listens at the target
                client.close()
                continue
            self._pairs.append((client, server))
            threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if down:
                    self.bytes_down += len(data)
                    mute = self._mute_down
                else:
                    self.bytes_up += len(data)
                    mute = self.bytes_down >= self._mute_up_from
                    self.swallowed_up += mute * len(data)
                if not mute:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
