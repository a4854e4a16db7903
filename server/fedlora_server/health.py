"""The gRPC health protocol (grpc.health.v1) on the server's own port, for whoever probes whether the server is up.

Only Check is there. Watch would hold a thread for as long as a stranger likes, and is answered by UNIMPLEMENTED, as the
protocol allows. A probe that does not send its request holds a thread too, until `MOST_PROBES` later ones have come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from fedlora import wire

SERVICE = "grpc.health.v1.Health"
NAMES = frozenset({"", wire.SERVICE.strip("/").partition("/")[0]})
"""Services whose health is told: the server as a whole, and the one that clients use."""
MOST_PROBES = 8
"""Largest number of probes at a time. When another comes, the oldest is cut off."""


class Health:
    """The service.

    Args:
        serving: returns whether the server takes clients.
    """

    def __init__(self, serving: Callable[[], bool]) -> None:
        self._serving = serving
        self._lock = threading.Lock()
        self._probes: list[grpc.ServicerContext] = []

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler to add to a gRPC server."""
        # Check is unary. A handler of a unary request is called when the request has come; this one, at once.
        check = grpc.stream_unary_rpc_method_handler(
            self._check, request_deserializer=HealthCheckRequest.FromString,
            response_serializer=HealthCheckResponse.SerializeToString)
        return grpc.method_handlers_generic_handler(SERVICE, {"Check": check})

    def _check(self, requests: Iterator[HealthCheckRequest], context: grpc.ServicerContext) -> HealthCheckResponse:
        with self._lock:
            if len(self._probes) >= MOST_PROBES:
                self._probes.pop(0).cancel()
            self._probes.append(context)
        try:
            request = next(requests, None)
        finally:
            with self._lock:
                if context in self._probes:
                    self._probes.remove(context)
        if request is None or request.service not in NAMES:
            context.abort(grpc.StatusCode.NOT_FOUND, "the services are fedlora.Federation and the empty name")
        return HealthCheckResponse(status=HealthCheckResponse.SERVING if self._serving() else
                                   HealthCheckResponse.NOT_SERVING)
