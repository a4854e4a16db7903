"""--on-event: a command of the coordinator's that is run for each of a fixed set of events.

The command is run without a shell, one event at a time, in a thread of its own. It finds the event as a JSON object on
its stdin, and the most important fields in its environment. Whatever it does, the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

from typing_extensions import override

from fedlora.plan import RunPlan
from fedlora_server.observer import ClientEvent, RoundRecord, jsonable
from fedlora_server.peer_lines import PeerLines
from fedlora_server.trackers import Tracker, Watched

log = logging.getLogger(__name__)

EVENTS = {
    "run-begun": "the rounds begin, also those of a resumed run",
    "waiting": "too few clients are there, and the run waits for more",
    "client-lost": "a client's connection broke; the same client at most once a minute",
    "client-refused": "a client declined, was turned away, or its upload was refused; once a minute as well",
    "sum-unopened": "an attempt at a secure sum ended unopened, and its clients have charged it",
    "round-finished": "a round is closed and its checkpoint is on the disk",
    "held-up": "this machine cannot store files for now, and the run waits",
    "certificate-ends-soon": "the server's certificate ends within 30 days; once a day",
    "run-ended": "there is no further round, for the reason given",
}
"""Event → when it happens."""

LIMIT_S = 30.0
"""Seconds after which a command is killed."""
LEAVE_S = 10.0
"""Seconds that a server waits at its end for the last commands."""
MOST_WAITING = 64
"""Largest number of events that wait. Further ones are left out, and a message says how many."""
MOST_WAITING_ABOUT_CLIENTS = 32
"""Largest number of waiting events at which one about a client is still taken: clients decide how often they come."""
DAY_S = 86_400.0
MOST_SAID = 300
"""Characters of the command's stderr that a message quotes."""


def command_of(given: str) -> list[str]:
    """Return the words of --on-event CMD.

    Raises:
        ValueError: there is no such command on this machine.
    """
    words = shlex.split(given)
    if shutil.which(words[0]) is None:
        raise ValueError(f"--on-event: {words[0]!r} is no command of this machine, or it may not be run; give its full "
                         "path, and make it executable")
    return words


class OnEvent(Tracker):
    """The tracker that runs the command.

    Args:
        run: the run to watch.
        command: the command and its arguments.
        expiry: returns the Unix time at which the server's certificate ends, and a warning if that is soon; None
            without TLS.
        stopped: returns "stopped" or "suspended" if the run was asked to stop; "" if it was not.
        limit_s: seconds after which the command is killed.
    """

    def __init__(self, run: Watched, command: Sequence[str], *,
                 expiry: Callable[[], tuple[float, str | None] | None] = lambda: None,
                 stopped: Callable[[], str] = lambda: "", limit_s: float = LIMIT_S) -> None:
        super().__init__(run)
        self._command, self._expiry, self._stopped, self._limit_s = list(command), expiry, stopped, limit_s
        self._lines = PeerLines()
        self._waiting: deque[Mapping[str, object]] = deque()
        self._changed = threading.Condition()
        self._left_out, self._ended = 0, False
        self._waits, self._reason, self._rounds = False, "failed", 0
        self._running: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._work, name="fedlora-on-event", daemon=True)
        self._thread.start()

    def end(self, timeout_s: float = LEAVE_S) -> None:
        """Wait for the commands that are left, for a bounded time, and kill what still runs then."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._changed:
                left, running = len(self._waiting), self._running
                self._waiting.clear()
            if running is not None:
                _kill(running)
            log.warning("--on-event: the command had not ended after %g s and was killed; %d events were left out",
                        timeout_s, left)

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._rounds = plan.rounds
        self._put("run-begun", rounds=plan.rounds, finished=before[-1].round if before else 0)

    @override
    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        if not self._waits:
            self._put("waiting", needed=needed, present=present, timeout_s=timeout_s)
        self._waits = True

    @override
    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        self._waits = False

    @override
    def client(self, event: ClientEvent) -> None:
        about = {"lost": "client-lost", "refused": "client-refused", "declined": "client-refused",
                 "turned-away": "client-refused"}.get(event.kind)
        if about is not None and self._lines.admit(event.name, about) is not None:
            self._put(about, client=event.name, how=event.kind, code=event.code, round=event.round)

    @override
    def unopened(self, round: int, attempt: int, why: str) -> None:
        self._put("sum-unopened", round=round, attempt=attempt, reason=why)

    @override
    def held_up(self, reason: str) -> None:
        self._put("held-up", reason=reason)

    @override
    def finished(self, record: RoundRecord) -> None:
        if record.round:
            self._put("round-finished", round=record.round, rounds=self._rounds, asked=len(record.cohort),
                      uploaded=len(record.uploaded), lost=len(record.lost), refused=len(record.refused),
                      rejected=len(record.rejected), unopened=record.unopened or None,
                      seconds=round(record.seconds, 3), bytes_up=record.bytes_up, bytes_down=record.bytes_down,
                      evaluation=record.evaluation)

    @override
    def ended(self, reason: str) -> None:
        self._reason = reason

    @override
    def close(self) -> None:
        how = self._stopped() if self._reason in ("stopped", "failed") else ""
        self._put("run-ended", reason=how or self._reason)

    def _put(self, event: str, **about: object) -> None:
        """Queue an event, which takes no time, or leave it out if too many wait."""
        most = MOST_WAITING_ABOUT_CLIENTS if event.startswith("client-") else MOST_WAITING
        known = {"event": event, "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", "run": self.run.run_id,
                 "folder": str(self.run.out), **about}
        with self._changed:
            if len(self._waiting) >= most and event != "run-ended":
                self._left_out += 1
                return
            self._waiting.append(known)
            self._changed.notify()

    def _work(self) -> None:
        look_at = time.monotonic()
        while True:
            with self._changed:
                if not self._waiting and not self._ended:
                    self._changed.wait(max(0.0, look_at - time.monotonic()))
                event = self._waiting.popleft() if self._waiting else None
                left_out, self._left_out = self._left_out, 0
                if event is None and self._ended:
                    return
            if left_out:
                _warn("--on-event: %d events were left out, because the command is slower than they come", left_out)
            if event is not None:
                self._run(event)
            if time.monotonic() >= look_at:
                look_at = time.monotonic() + DAY_S
                self._look_at_certificate()

    def _look_at_certificate(self) -> None:
        found = self._expiry()
        if found is not None and found[1] is not None:
            self._put("certificate-ends-soon", ends=f"{datetime.fromtimestamp(found[0], UTC):%Y-%m-%dT%H:%M:%SZ}",
                      message=found[1])

    def _run(self, event: Mapping[str, object]) -> None:
        """Run the command for an event, and log if it fails."""
        fields = {name: value for name, value in event.items() if value is not None}
        named = {f"FEDLORA_{name.upper()}": str(fields.get(name, "")) for name in (
            "event", "run", "folder", "round", "client", "code", "reason")}
        try:
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, env=os.environ | named, start_new_session=True)
        except (OSError, ValueError) as error:
            _warn("--on-event: the command cannot be run: %s", error)
            return
        with self._changed:
            self._running = process
        said: list[bytes] = []
        reader = threading.Thread(target=_drain, args=(process, said), daemon=True)
        reader.start()
        assert process.stdin is not None
        with suppress(OSError), process.stdin as stdin:  # a command need not read it
            stdin.write(json.dumps(jsonable(fields)).encode() + b"\n")
        try:
            code = process.wait(self._limit_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            _warn("--on-event: the command did not end within %g s at event %s and was killed", self._limit_s,
                  event["event"])
            return
        finally:
            with self._changed:
                self._running = None
        if code:
            reader.join(1.0)
            text = b"".join(said).decode(errors="replace").strip()
            _warn("--on-event: the command ended with exit code %d at event %s%s", code, event["event"],
                  f": {''.join(c if c.isprintable() else ' ' for c in text[:MOST_SAID])}" if text else "")


def _warn(message: str, *about: object) -> None:
    """Log a line about the command, at most one a minute of each kind."""
    log.warning(message, *about, extra={"peer": "", "kind": message})


def _drain(process: subprocess.Popen[bytes], said: list[bytes]) -> None:
    """Read the command's stderr to its end, so that it never blocks, and keep the beginning."""
    assert process.stderr is not None
    with suppress(OSError, ValueError), process.stderr as stderr:
        said.append(stderr.read(4 * MOST_SAID))
        while stderr.read(65536):
            pass


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the command with all that it started."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
