"""A TCP link that a test can cut, mend and make deaf: real sockets between a real client and a real server."""

from __future__ import annotations

import contextlib
import socket
import threading


class TcpProxy:
    """Forwards to `target` (host:port) from `address`, and counts `bytes_up` and `bytes_down`."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[0], int(target.rpartition(":")[2])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._open, self._mute = True, False
        self.bytes_up = self.bytes_down = 0
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
        self._open, self._mute = True, False

    def mute_downlink(self) -> None:
        """Swallow what the server says."""
        self._mute = True

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._open:
                client.close()
                continue
            server = socket.create_connection(self._target)
            self._pairs.append((client, server))
            threading.Thread(target=self._forward, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, True), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, down: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if down:
                    self.bytes_down += len(data)
                else:
                    self.bytes_up += len(data)
                if not (down and self._mute):
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
