"""The writer of the audit log: a tracker that every run of the server has.

Events come from any thread, some under the lock of the client registry. They are queued, and a thread of their own
writes all that wait at once and synchronises the file. The round loop waits for it before a round counts as closed.

A full disk is waited out, as for the run's other files: events wait in memory, and so does the round loop. After any
other fault, or if the run is stopped while the disk is full, the run ends and `check` raises the fault. It is resumed
once the disk can be written to: a run without its audit log does not go on.

A peer decides how often it joins. So lines about joining and leaving are limited: one a minute for each client and
kind, and `peer_lines.MOST_OF_A_KIND` of a kind for all clients that show no certificate. While the disk is full, none
is queued beyond `MOST_WAITING`. The next line says how many were left out. Lines about orders and rounds are never left
out; the orders that the server gives bound their number.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from typing_extensions import override

import fedlora
from fedlora.files import append_to_file
from fedlora.json_lines import time_now
from fedlora.plan import RunPlan, plan_digest
from fedlora.wire.codec import MAX_NAME
from fedlora_server import checkpoint
from fedlora_server.checkpoint import Unfinished
from fedlora_server.observer import ClientEvent, RoundRecord
from fedlora_server.peer_lines import PeerLines
from fedlora_server.trackers import Tracker, Watched

from .chain import FILE, NO_LINE, Line, read, sealed, spelled

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Number of lines that may wait for the disk. Beyond it, lines about joining and leaving are left out."""
VERDICTS = frozenset({"accepted", "curbed", "left-out"})
"""Events that say what became of an upload when its round was closed."""


class AuditLog(Tracker):
    """The tracker that writes audit.jsonl. It hears no more once the rounds have ended, so that its head is final.

    Args:
        run: the run to watch.
        plan: the run's plan as far as it is known.
        stop: set here after a fault, so that the run ends; if it is set, a full disk is not waited for.
        held_up: told, in the round loop's thread, why the loop waits.
        left: how an earlier server left the run, to continue its log.

    Raises:
        ValueError: the earlier server's log is damaged or another run's.
        OSError: it cannot be read, or the end of a torn line cannot be cut.
    """

    def __init__(self, run: Watched, plan: RunPlan, stop: threading.Event, held_up: Callable[[str], object],
                 left: Unfinished | None = None) -> None:
        super().__init__(run)
        self._path, self._stop, self._held_up = run.out / FILE, stop, held_up
        self._changed = threading.Condition()
        self._waiting: deque[Line] = deque()
        self._queued = self._written = self._more = 0
        self._blocked = ""
        self._fault: Exception | None = None
        self._sealed = self._closed = False
        self._known, self._strangers = PeerLines(most_of_a_kind=None), PeerLines()
        self._uploads: dict[tuple[int | None, str], Line] = {}  # (round, client) → its upload
        self._judged: set[tuple[int | None, str]] = set()  # of rounds that an earlier server closed
        self._closed_round, self._continued = -1, False
        self._late: set[tuple[str, int | None, int | None]] = set()
        self._number, self._head = 0, NO_LINE
        self._thread: threading.Thread | None = None
        about = {"run": plan.run_id, "version": fedlora.__version__, "fingerprint": run.fingerprint or None,
                 "plan_sha256": None if plan.labels_open else plan_digest(plan)}
        if left is None:
            self._add("opened", **about)
        else:
            self._add("resumed", round=left.round, **about, **self._taken_up(plan.run_id))

    @property
    def head(self) -> str:
        """The hash of the last line that is on the disk."""
        return self._head

    def check(self) -> None:
        """Raise the fault that ended the log; do nothing if there was none.

        Raises:
            OSError: the file cannot be written to.
            ValueError: the run's folder was removed.
        """
        if self._fault is not None:
            raise self._fault

    @override
    def open(self) -> None:
        self._thread = threading.Thread(target=self._write, name="fedlora-audit", daemon=True)
        self._thread.start()

    @override
    def client(self, event: ClientEvent) -> None:
        values = {"client": event.name[:MAX_NAME], "fingerprint": event.fingerprint or None, "peer": event.peer or None,
                  "round": event.round, "attempt": event.attempt, "code": event.code or None,
                  "sha256": event.sha256 or None, "bytes": event.upload_bytes if event.sha256 else None}
        order = event.name, event.round, event.attempt
        with self._changed:
            if event.kind == "late":  # a client can repeat its answer as often as it likes
                if order in self._late:
                    return
                self._late.add(order)
            if event.round is None and not self._admits(event):
                self._more += 1
                return
            if event.kind == "uploaded":
                self._uploads[event.round, event.name] = values
            self._add(event.kind, **values)

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._add("begun", round=before[-1].round if before else 0, plan_sha256=plan_digest(plan))
        for record in before:  # an earlier server may have been killed between its checkpoint and these lines
            if self._continued and record.round > self._closed_round:
                self._close_round(record)
        self._judged.clear()
        self._flush()

    @override
    def rostered(self, round: int, names: tuple[str, ...], threshold: int, digest: str) -> None:
        self._add("rostered", round=round, sha256=digest)

    @override
    def unopened(self, round: int, attempt: int, why: str) -> None:
        self._add("unopened", round=round, attempt=attempt)

    @override
    def finished(self, record: RoundRecord) -> None:
        self._close_round(record)
        self._flush()

    @override
    def ended(self, reason: str) -> None:
        self._end(reason)

    @override
    def close(self) -> None:
        self._end("interrupted")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._fault is None:
            self.run.console.print(
                f"The audit log has {self._number} lines and the head {self._head}. Keep it elsewhere: it shows later "
                "that no line was changed or cut off (fedlora-server audit-log verify).", soft_wrap=True)

    def _end(self, how: str) -> None:
        self._add("ended", code=how)
        with self._changed:
            self._sealed = True
        self._flush()

    def _admits(self, event: ClientEvent) -> bool:
        """Return whether a line about joining or leaving is written. Called with the lock held."""
        if len(self._waiting) >= MOST_WAITING:
            return False
        if event.fingerprint:
            return self._known.admit(event.fingerprint, event.kind) is not None
        who = event.peer if event.kind == "turned-away" else event.name
        return self._strangers.admit(who, event.kind) is not None

    def _close_round(self, record: RoundRecord) -> None:
        """Write what became of each upload of a round, and that the round is closed."""
        with self._changed:
            here = {name: values for (number, name), values in self._uploads.items() if number == record.round}
            for name in sorted({*here, *record.uploaded}):
                if (record.round, name) in self._judged:
                    continue
                verdict, code = _verdict(record, name)
                self._add(verdict, **{"client": name, "round": record.round, **here.get(name, {}), "code": code})
            self._add("closed", round=record.round)
            self._uploads = {key: values for key, values in self._uploads.items() if (key[0] or 0) > record.round}

    def _add(self, event: str, **values: object) -> None:
        with self._changed:
            if self._sealed or self._fault is not None:
                return
            self._waiting.append({"time": time_now(), "event": event, **values, "more": self._more})
            self._more, self._queued = 0, self._queued + 1
            self._changed.notify_all()

    def _flush(self) -> None:
        """Wait until all that was queued is on the disk, or a fault has ended the log."""
        if self._thread is None:
            return
        told = ""
        with self._changed:
            last = self._queued
        while True:
            with self._changed:
                while not (done := self._written >= last or self._fault is not None) and (told or not self._blocked):
                    self._changed.wait()
                if done:
                    return
                told = self._blocked
            self._held_up(told)

    # The thread of the file.

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = list(self._waiting)
            try:
                head, content = _chained(batch, self._number, self._head)
                checkpoint.patiently(partial(append_to_file, self._path, content), self.run.out, self._stop,
                                     self._block)
            except Exception as fault:
                self._give_up(fault)
                return
            with self._changed:
                for _ in batch:
                    self._waiting.popleft()
                self._number, self._head, self._blocked = self._number + len(batch), head, ""
                self._written += len(batch)
                self._changed.notify_all()

    def _block(self, reason: str) -> None:
        with self._changed:
            self._blocked = reason
            self._changed.notify_all()

    def _give_up(self, fault: Exception) -> None:
        with self._changed:
            self._fault = fault
            lost = len(self._waiting) + self._more
            self._changed.notify_all()
        log.error("The audit log %s cannot be written (%s); its last %d events are lost, and the run ends. Remove the "
                  "cause, then go on with fedlora-server --resume %s", self._path,
                  getattr(fault, "strerror", None) or fault, lost, self.run.out)
        self._stop.set()

    def _taken_up(self, run_id: str) -> dict[str, object]:
        """Read the log of the earlier server and cut off a torn line.

        Returns:
            What the first new line says of it.
        """
        if not self._path.exists():
            return {"code": "no-log"}
        chain = read(self._path)
        if chain.wrong:
            raise ValueError(f"--resume: the audit log {self._path} was changed or is damaged: {chain.wrong}. Restore "
                             "it from a copy; or move it to another folder, and a new one is begun, which says so")
        if chain.lines and chain.lines[0]["run"] != run_id:
            raise ValueError(f"--resume: the audit log {self._path} is that of run {chain.lines[0]['run']}, not of run "
                             f"{run_id}; restore the file that belongs to this run")
        self._number, self._head, self._continued = len(chain.lines), chain.head, bool(chain.lines)
        for line in chain.lines:
            if line["event"] == "uploaded":
                self._uploads[line["round"], line["client"]] = {
                    field: line[field] for field in ("client", "fingerprint", "peer", "round", "attempt", "sha256",
                                                     "bytes")}
            elif line["event"] in VERDICTS:
                self._judged.add((line["round"], line["client"]))
            elif line["event"] == "closed":
                self._closed_round = line["round"]
                self._uploads = {key: values for key, values in self._uploads.items()
                                 if (key[0] or 0) > self._closed_round}
        if not chain.torn_bytes:
            return {} if chain.lines else {"code": "no-log"}
        with self._path.open("r+b") as file:
            file.truncate(self._path.stat().st_size - chain.torn_bytes)
        return {"code": "torn", "bytes": chain.torn_bytes}


def _chained(events: Sequence[Line], last: int, head: str) -> tuple[str, bytes]:
    """Return the new head and the lines that follow the line with the number `last` and this hash."""
    lines = []
    for number, values in enumerate(events, start=last + 1):
        line = sealed(values, number, head)
        head = line["hash"]
        lines.append(spelled(line) + b"\n")
    return head, b"".join(lines)


def _verdict(record: RoundRecord, name: str) -> tuple[str, str | None]:
    """Return what became of a client's upload in a closed round, and the code of an upload that was left out."""
    if name in record.rejected:
        return "left-out", "rejected"
    if name not in record.uploaded:
        return "left-out", "unused"  # it came when the round was about to close
    return ("curbed" if name in record.curbed else "accepted"), None
