"""What a server shows to whoever keeps it alive, put together from the command's options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

import fedlora
from fedlora import wire
from fedlora.config import ServerConfig
from fedlora.identity.certificates import utc_now
from fedlora_server.observer import jsonable
from fedlora_server.phases import ENDING
from fedlora_server.registry_engine import RegistryEngine
from fedlora_server.stopping import Stopping
from fedlora_server.tls import ServerTls
from fedlora_server.trackers import Tracker, Watched

from .control import ControlSocket
from .on_event import OnEvent, command_of

if TYPE_CHECKING:
    from .endpoint import Endpoint


def check(options: ServerConfig) -> None:
    """Check the options of which `Operations` is made, which is quick.

    Raises:
        ValueError: the command of --on-event does not exist, or prometheus-client is not installed.
    """
    if options.on_event is not None:
        command_of(options.on_event)
    if options.metrics is not None:
        try:
            import prometheus_client  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("--metrics needs prometheus-client, which is not installed: pip install "
                             "'fedlora[metrics]'") from None


class Operations:
    """The control socket, the metrics and the commands at events of one run, from when it is made until `close`.

    Args:
        options: the command's options.
        run: what trackers learn of the run.
        stopping: how the run is stopped.
        tls: the server's identity; None without TLS.

    Raises:
        ValueError: the port of --metrics is taken, or `check` raises it.
    """

    def __init__(self, options: ServerConfig, run: Watched, stopping: Stopping, tls: ServerTls | None) -> None:
        self._options, self._run, self._stopping, self._tls = options, run, stopping, tls
        self._engine: RegistryEngine | None = None
        self._control: ControlSocket | None = None
        self._endpoint: Endpoint | None = None
        self._on_event: OnEvent | None = None
        self.progress = run.progress
        self.trackers: dict[str, Tracker] = {}
        """The trackers to pass to `Trackers` as `others`."""
        check(options)
        if options.metrics is not None:
            self._endpoint = self._listen(options.metrics, run.console)
        if options.on_event is not None:
            self._on_event = OnEvent(run, command_of(options.on_event), expiry=self._expiry_and_warning,
                                     stopped=stopping.how)
            self.trackers["on-event"] = self._on_event

    def attend(self, engine: RegistryEngine) -> None:
        """Answer from now on for this engine, which listens."""
        self._engine = engine
        self._control = ControlSocket(self._run.out, self._answer).open()

    def close(self) -> None:
        """End all of it. The last commands have a bounded time."""
        if self._on_event is not None:
            self._on_event.end()
        if self._endpoint is not None:
            self._endpoint.end()
        if self._control is not None:
            self._control.close()
        self._on_event = self._endpoint = self._control = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _listen(self, address: str, console: Console) -> Endpoint:
        from .endpoint import Endpoint
        from .metrics import Metrics

        metrics = Metrics(self._run, self.progress, lambda: self._engine, self._expiry)
        endpoint = Endpoint(address, metrics, self._is_healthy)
        self.trackers["metrics"] = metrics
        console.print(f"Metrics are at {endpoint.url}", soft_wrap=True)
        if not wire.is_loopback(address):
            console.print("Other machines can read them, unencrypted: the run's id, strategy, rounds and figures, and "
                          "numbers of clients, bytes and refusals. They hold no client's name.", soft_wrap=True)
        return endpoint

    def _is_healthy(self) -> bool:
        return self._engine is not None and not self._stopping.asked.is_set() and self.progress.now().phase != ENDING

    def _expiry(self) -> float | None:
        return None if self._tls is None else self._tls.certificate.not_after.timestamp()

    def _expiry_and_warning(self) -> tuple[float, str | None] | None:
        if self._tls is None:
            return None
        certificate = self._tls.certificate
        return certificate.not_after.timestamp(), certificate.expiry_warning(utc_now())

    def _answer(self, request: Mapping[str, Any]) -> tuple[Mapping[str, object], bool]:
        """Answer a request of `fedlora-server status` or `stop` (`control.Answer`)."""
        if request.get("ask") == "status":
            return self.status(), False
        if request.get("ask") == "stop":
            return self._stop(request)
        raise ValueError("a request asks for status or stop")

    def _stop(self, request: Mapping[str, Any]) -> tuple[Mapping[str, object], bool]:
        suspend = request.get("suspend")
        if not isinstance(suspend, bool):
            raise ValueError("stop needs suspend: true or false")
        first = self._stopping.ask(goes_on=suspend)
        return {"first": first, "goes_on": self._stopping.goes_on.is_set(), "process": os.getpid()}, True

    def status(self) -> dict[str, object]:
        """Return what `fedlora-server status --json` prints. Times are Unix times."""
        engine = self._engine
        if engine is None:
            raise ValueError("the server does not listen yet")
        now = self.progress.now(engine.held_up)
        return {
            "running": True, "run": self._run.run_id, "folder": str(self._run.out.absolute()),
            "strategy": self._options.strategy, "address": engine.address, "process": os.getpid(),
            "version": fedlora.__version__, "stopping": self._stopping.asked.is_set(), "phase": now.phase,
            "why": now.why, "since": now.since,
            "rounds": {"planned": now.planned, "finished": now.finished, "current": now.current},
            "round_left_s": now.round_left_s, "run_left_s": now.run_left_s, "finished_at": now.finished_at,
            "bytes": {"up": engine.bytes_up, "down": engine.bytes_down}, "uploads": now.uploads,
            "refusals": now.refusals, "turned_away": now.turned_away, "lost": now.lost,
            "disconnected": now.disconnected, "evaluation": jsonable(now.evaluation),
            "clients": [{"name": member.name, "state": member.state, "since": member.since, "round": member.working_on,
                         "uploaded_at": member.uploaded_at, "bytes_up": member.bytes_up,
                         "bytes_down": member.bytes_down} for member in engine.members()]}
