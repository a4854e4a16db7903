"""The page report.html, for a browser: what the run does, its curves, rounds and clients, and what was disclosed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from typing_extensions import override

from fedlora.files import PASSING, replace_file
from fedlora.plan import RunPlan
from fedlora_server.observer import ClientEvent, RoundRecord, named
from fedlora_server.page import FILE
from fedlora_server.page.account import Account
from fedlora_server.page.html import page
from fedlora_server.trackers import Tracker, Watched

log = logging.getLogger(__name__)

EVERY_S = 2.0
"""Least seconds from one writing of the page to the next."""
SHARE = 0.02
"""Largest share of the time that writing the page may take; a longer wait follows a page that took long."""
UNCHANGED_S = 10.0
"""Seconds after which the page is written though nothing happened, so that it shows the time that is left."""
POLL_S = 0.25


class Page(Tracker):
    """The tracker that writes the page, in a thread of its own, so that no round waits for it.

    A write that fails for lack of disk space is repeated. Any other failure ends the tracker at the next event.
    """

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._account, self._lock, self._over = Account(), threading.Lock(), threading.Event()
        self._changed, self._next, self._said_full = True, -1.0, False
        self._written = 0.0
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def write_if_due(self, now: float) -> bool:
        """Write the page if something has changed, and the last writing is long enough ago.

        Args:
            now: monotonic seconds.

        Returns:
            Whether the page was written.
        """
        with self._lock:
            due = now >= self._next and (self._changed or now - self._written >= UNCHANGED_S)
            if not due:
                return False
            self._changed, self._written, self._next = False, now, now + EVERY_S
        began = time.perf_counter()
        self._write()
        self._next = now + max(EVERY_S, (time.perf_counter() - began) / SHARE)
        return True

    def _write(self) -> None:
        with self._lock:
            account = self._account.copy()
        run = self.run
        content = page(account, run.progress.now(), title=run.title, run_id=run.run_id, options=run.options,
                       joined=run.joined() if account.plan is not None else None)
        replace_file(run.out / FILE, content.encode(), 0o666, make_folder=False)

    def _keep_writing(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                self.write_if_due(time.monotonic())
            except OSError as error:
                if error.errno not in PASSING:
                    self._failure = error
                    return
                if not self._said_full:
                    self._said_full = True
                    log.warning("%s cannot be written for now (%s); it is tried again", FILE, error.strerror)
                self._changed = True
            except Exception as error:
                self._failure = error
                return

    @contextmanager
    def _told(self) -> Iterator[Account]:
        """Within the block, change the account. The page will show the change.

        Raises:
            Exception: the page could not be written.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:
            yield self._account
            self._changed = True

    @override
    def open(self) -> None:
        self._thread = threading.Thread(target=self._keep_writing, name="fedlora-page", daemon=True)
        self._thread.start()

    @override
    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._told() as account:
            account.closed = True
        self._write()

    @override
    def said(self, line: str) -> None:
        with self._told() as account:
            account.note(line)

    @override
    def client(self, event: ClientEvent) -> None:
        self._changed = True

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        with self._told() as account:
            account.begin(plan, before)

    @override
    def waiting(self, needed: int, present: int, timeout_s: float | None) -> None:
        with self._told():
            pass

    @override
    def asked(self, round: int, attempt: int, names: tuple[str, ...]) -> None:
        with self._told() as account:
            if attempt:
                secure = account.plan is not None and account.plan.secure_aggregation
                account.note(f"round {round}: asked {'again' if secure else 'as backup'} {named(names)}")

    @override
    def fewer(self, round: int, connected: int, needed: int) -> None:
        with self._told() as account:
            account.note(f"round {round}: {connected} connected, fewer than --min-clients {needed}")

    @override
    def overdue(self, round: int, names: tuple[str, ...], missing: int) -> None:
        with self._told() as account:
            account.note(f"round {round}: {named(names)} did not answer within --round-timeout")

    @override
    def doubted(self, round: int, why: str) -> None:
        with self._told() as account:
            account.note(f"round {round}: the new state is unusable: {why}; it is computed again without the longest "
                         "uploads")

    @override
    def uncompared(self, round: int, uploads: int) -> None:
        with self._told() as account:
            account.note(f"round {round}: with {uploads} upload{'s' * (uploads != 1)} and no earlier round to compare "
                         "with, an unusually long upload would not be noticed")

    @override
    def held_up(self, reason: str) -> None:
        with self._told() as account:
            account.note(f"the run waits: {reason}")

    @override
    def rostered(self, round: int, names: tuple[str, ...], threshold: int, digest: str) -> None:
        with self._told() as account:
            account.note(f"round {round}: a new roster of {len(names)}; a sum needs {threshold} of them")

    @override
    def left_out(self, name: str, why: str) -> None:
        with self._told() as account:
            account.note(f"{name} can be in no roster: {why}")

    @override
    def summing(self, round: int, phase: str) -> None:
        with self._told():
            pass

    @override
    def unopened(self, round: int, attempt: int, why: str) -> None:
        with self._told() as account:
            account.note(f"round {round}: attempt {attempt} ended unopened: {why}")

    @override
    def answered(self, round: int, name: str, outcome: str) -> None:
        with self._told() as account:
            if outcome != "uploaded":
                account.note(f"round {round}: {name} {outcome}")

    @override
    def combining(self, round: int, uploads: int) -> None:
        with self._told():
            pass

    @override
    def evaluated(self, round: int, figures: Mapping[str, float]) -> None:
        with self._told():
            pass

    @override
    def finished(self, record: RoundRecord) -> None:
        with self._told() as account:
            account.finished(record)
            for name, reason in record.rejected.items():
                account.note(f"round {record.round}: the upload of {name} was left out: {reason}")
            for name, how in record.curbed.items():
                account.note(f"round {record.round}: the upload of {name} weighs less than it claims: {how}")

    @override
    def ended(self, reason: str) -> None:
        with self._told() as account:
            account.ended = reason


TRACKER = Page
