"""A TCP link that a test can cut, mend and make deaf: real sockets between a real client and a real server."""

from __future__ import annotations

import contextlib
import math
import socket
import threading


class TcpProxy:
    """Forwards to `target` (host:port) from `address`.

    Attributes:
        bytes_up, bytes_down: that came from the client and from the server.
        swallowed_up: those of the client that never reached the server.
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
        """Close all links, and new ones as soon as they come."""
        self._open = False
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._pairs.clear()

    def restore(self) -> None:
        """Forward again, both ways."""
        self._open, self._mute_down, self._mute_up_from = True, False, math.inf

    def mute_downlink(self) -> None:
        """Swallow what the server says."""
        self._mute_down = True

    def mute_uplink_after(self, bytes_down: int) -> None:
        """Swallow what the client says from the moment when it has been told so many bytes more."""
        self._mute_up_from = self.bytes_down + bytes_down

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._open:
                client.close()
                continue
            try:
                server = socket.create_connection(self._target)
            except OSError:  # nobody listens there
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
