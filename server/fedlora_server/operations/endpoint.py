"""The HTTP endpoint that --metrics opens: /metrics for Prometheus, /healthz for whoever asks whether the server is up.

Each connection carries one request. Beyond `MOST_AT_ONCE` connections the oldest is cut off, so that nobody who holds
connections open keeps others from being answered.
"""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from typing_extensions import override

MOST_AT_ONCE = 8
"""Largest number of connections at a time."""
SILENT_S = 5.0
"""Seconds without a byte after which a connection is ended."""


class Endpoint(socketserver.ThreadingMixIn, HTTPServer):
    """An HTTP server in threads of its own, from when it is made until `end`.

    Args:
        address: host:port to listen on; port 0 takes a free one (see `url`).
        collector: returns the metrics at each request to /metrics.
        healthy: returns whether /healthz answers 200; it answers 503 otherwise.

    Raises:
        ValueError: the address is taken, or not this machine's.
    """

    daemon_threads, block_on_close, allow_reuse_address = True, False, True

    def __init__(self, address: str, collector: Collector, healthy: Callable[[], bool]) -> None:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry, self.healthy = CollectorRegistry(), healthy
        self.registry.register(collector)
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        try:
            super().__init__((host, int(port)), _Handler)
        except OSError as error:
            raise ValueError(f"cannot listen on {address} for --metrics: {error.strerror or error}. Choose another "
                             "port, or a host name of this machine") from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.server_address[1]}/metrics"
        threading.Thread(target=self.serve_forever, name="fedlora-metrics", daemon=True).start()

    def end(self) -> None:
        """Stop answering, and free the port."""
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._open:
                _cut_off(connection)

    @override
    def server_bind(self) -> None:
        """Bind the port, without HTTPServer's look-up of this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    @override
    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= MOST_AT_ONCE:
                _cut_off(self._open.pop(0))
            self._open.append(request)
        super().process_request(request, client_address)

    @override
    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            if request in self._open:
                self._open.remove(request)
        super().shutdown_request(request)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a connection that breaks is its owner's affair."""


class _Handler(BaseHTTPRequestHandler):
    """One request: GET /metrics or GET /healthz."""

    server: Endpoint
    timeout = SILENT_S
    server_version, sys_version = "FedLoRA", ""

    def do_GET(self) -> None:
        """Answer the request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._send(200, content_type, encoder(self.server.registry))
        elif path == "/healthz":
            healthy = self.server.healthy()
            self._send(200 if healthy else 503, "text/plain; charset=utf-8", b"ok\n" if healthy else b"ending\n")
        else:
            self._send(404, "text/plain; charset=utf-8", b"there are /metrics and /healthz\n")

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a peer decides how often it asks."""


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):  # it may be closed already
        connection.shutdown(socket.SHUT_RDWR)
