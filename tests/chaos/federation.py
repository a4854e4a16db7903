"""One run of a server and three clients under a case: started, struck, started again as by a supervisor, and observed.

A supervisor starts a process again, with the same command, after exit codes 1, 3, 130 and 143, and after a kill. After
2, 4 and 5 a person has to see to it; the case says where that is expected.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from fedlora.identity import make_request
from fedlora.identity.certificates import utc_now
from fedlora.identity.folder import AUTHORITY, CERTIFICATE
from fedlora_server.pki.authority import Authority
from tests.chaos import clocks, tested
from tests.chaos.disks import Disks
from tests.chaos.links import SERVER as AT_SERVER
from tests.chaos.links import Links
from tests.chaos.observed import CLIENTS, EVERYONE, SERVER, Observed, lines_of
from tests.chaos.tested import Hold, Life
from tests.processes import Process, free_port, write_rows

if TYPE_CHECKING:
    from tests.chaos.cases import Case, Step

ROUNDS, ROWS = 3, 120
OF_THE_RUN = ("--min-clients", 3, "--rounds", ROUNDS, "--labels", "routine,urgent", "--rank", 2, "--local-steps", 2,
              "--batch-size", 8, "--max-length", 16, "--seed", 5)
OF_A_CLIENT = ("--threads", 1, "--device", "cpu", "--precision", "fp32", "--epsilon", 200, "--declared-size", ROWS,
               "--yes", "--connect-timeout", 60)
AGAIN = frozenset({1, 3, 130, 143, -signal.SIGKILL, -signal.SIGTERM})
RESTART_S = 0.3
"""Seconds until a supervisor starts a process again."""
PERSON_S = 0.5
"""Seconds until a person does so, from when all is mended and the process has ended."""
TOLD_WITHIN_S = 20.0
"""Seconds from the server's last end within which clients must have ended."""
LOOK_EVERY_S, SAMPLE_EVERY_S = 0.01, 0.25
FELT_WITHIN_S = 20.0
"""Seconds beyond a fault's own time for which it stays if nobody has felt it yet."""
DISK_MEGABYTES = 12
AGE = timedelta(days=30)
"""Age of the certificates."""
_GIVEN: set[int] = set()


class Federation:
    """A server and its clients, each with a folder of its own: data, ledger, state, identity and temporary files.

    Args:
        folder: must not exist yet.
        checkpoint: folder of the base model.
        case: what happens to the run.
    """

    def __init__(self, folder: Path, checkpoint: Path, case: Case) -> None:
        folder.mkdir(parents=True)
        self.folder, self.case, self._checkpoint = folder, case, checkpoint
        self.links = Links(CLIENTS) if case.needs_links else None
        for who in EVERYONE:
            (folder / who).mkdir()
        self.disks = Disks({who: folder / who for who in EVERYONE}, DISK_MEGABYTES) if case.needs_disks else None
        self.address = f"{AT_SERVER}:9092" if self.links else f"127.0.0.1:{_own_port()}"
        since = utc_now() - AGE  # clocks that jump back by hours do not leave a certificate's time
        authority = Authority.create(self.identity(SERVER), ["127.0.0.1", AT_SERVER], now=since)
        for seed, who in enumerate(EVERYONE):
            own = self.seen(folder / who)
            (own / "tmp").mkdir()
            clocks.set_clock(self.clock(who), 0.0)
            if who != SERVER:
                write_rows(own / "data" / f"{who}.jsonl", seed, ROWS)
                issued = authority.sign(make_request(own / "tls", who), now=since)
                (own / "tls" / CERTIFICATE).write_bytes(issued.pem)
                shutil.copy(authority.folder / AUTHORITY, own / "tls" / AUTHORITY)
        self.processes: dict[str, Process] = {}
        self.codes: defaultdict[str, list[int]] = defaultdict(list)
        self._lives: Counter[str] = Counter()
        self._again_at: dict[str, float] = {}
        self._waiting_for_a_person: set[str] = set()
        self._gone: set[str] = set()  # not to be started again
        self._struck: list[tuple[Step, float]] = []
        self._observed = Observed()

    def seen(self, path: Path) -> Path:
        """Return the path by which this process finds a file of a process under test."""
        return self.disks.seen(path) if self.disks else path

    def clock(self, who: str) -> Path:
        return self.folder / f"{who}.clock"

    def hold(self, step: Step) -> Hold:
        return Hold(step.point, step.times, self.folder / f"moment-{self.case.steps.index(step)}")

    def identity(self, who: str) -> Path:
        return self.seen(self.folder / who / "tls")

    def start(self, who: str) -> None:
        """Start a process by the same command as ever; it waits at the moments that have not come yet."""
        own, command = self.folder / who, "server" if who == SERVER else "client"
        arguments: tuple[object, ...] = ("--model", self._checkpoint, "--tls", own / "tls")
        if who == SERVER:
            arguments += ("--address", self.address, "--out", own / "run", *OF_THE_RUN,
                          "--min-replies", len(CLIENTS) - len(self.case.without), *self.case.options)
        else:
            arguments += ("--server", self.address, "--data", own / "data" / f"{who}.jsonl", "--state", own / "state",
                          *OF_A_CLIENT)
        self._lives[who] += 1
        self.processes[who] = tested.start(Life(
            command, tuple(map(str, arguments)), self.folder / f"{who}.{self._lives[who]}.log",
            {"COLUMNS": "200", "TMPDIR": str(own / "tmp"), "XDG_STATE_HOME": str(own / "home" / "state"),
             "XDG_CONFIG_HOME": str(own / "home" / "config")},
            tuple(hold for step in self.case.steps
                  if step.who == who and not (hold := self.hold(step)).mark.exists()),
            self.folder / f"{who}.told", network=self.links.networks[who] if self.links else "",
            mounts=self.disks.mounts if self.disks else "",
            clock=self.clock(who) if who in self.case.clocked else None))

    def signal(self, who: str, number: int) -> bool:
        """Send a signal to a process. Return False if it has ended already."""
        process = self.processes.get(who)
        if process is None or process.poll() is not None:
            return False
        process.send_signal(number)
        return True

    def log(self, who: str) -> str:
        files = sorted(self.folder.glob(f"{who}.*.log"), key=lambda path: int(path.suffixes[-2][1:]))
        return "".join(file.read_text(errors="replace") for file in files)

    def run(self, limit_s: float, stop: Event) -> Observed:
        """Run the federation to its end, for so many seconds at most, or until `stop` is set."""
        began = time.monotonic()
        try:
            self._to_the_end(began + limit_s, stop)
            self._observed.seconds = time.monotonic() - began
            self._observe()
        finally:
            self.close()
        return self._observed

    def _to_the_end(self, deadline: float, stop: Event) -> None:
        for step in self.case.steps:
            if not step.who:
                self._strike(step)
        for who in EVERYONE:
            self.start(who)
        most: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        self._observed.most = most
        sample_at, told_by = 0.0, float("inf")
        while ((now := time.monotonic()) < min(deadline, told_by) and len(self._gone) < len(EVERYONE)
               and not stop.is_set()):
            self._do_what_is_due(now)
            for who in EVERYONE:
                self._supervise(who, now)
            if SERVER in self._gone and told_by == float("inf"):
                told_by = now + TOLD_WITHIN_S
            if now >= sample_at:
                sample_at = now + SAMPLE_EVERY_S
                for who, process in self.processes.items():
                    most[who] = tuple(map(max, most[who], _used(process.pid)))  # type: ignore[assignment]
            time.sleep(LOOK_EVERY_S)
        for step, mend_at in self._struck:
            if mend_at != float("inf"):
                self._mend(step)
        self._observed.in_time = time.monotonic() < deadline
        self._observed.untold = tuple(who for who in CLIENTS if not self.codes[who] or self.codes[who][-1] != 0)

    def _do_what_is_due(self, now: float) -> None:
        done = [step for step, _ in self._struck]
        for step in self.case.steps:
            if step in done or not self.hold(step).mark.exists():
                continue
            if len(lines_of(self.folder / f"{SERVER}.told")) >= step.after_updates:
                self._strike(step)
                self.hold(step).go.write_bytes(b"")
        due = [step for step, mend_at in self._struck if now >= mend_at and (
            now >= mend_at + FELT_WITHIN_S or all(fault.felt(self) for fault in step.faults))]
        for step in due:
            self._mend(step)
        self._struck = [(step, float("inf") if step in due else mend_at) for step, mend_at in self._struck]

    def _strike(self, step: Step) -> None:
        for fault in step.faults:
            if why := fault.strike(self):
                self._observed.missed.append(f"{fault}: {why}")
        self._struck.append((step, time.monotonic() + step.lasts_s))

    def _mend(self, step: Step) -> None:
        for fault in step.faults:
            if not fault.felt(self):
                self._observed.missed.append(f"{fault}: nobody felt it")
            fault.mend(self)

    @property
    def all_is_mended(self) -> bool:
        return all(mend_at == float("inf") for _, mend_at in self._struck)

    def _supervise(self, who: str, now: float) -> None:
        if who in self._gone:
            return
        if who in self._waiting_for_a_person:
            if self.all_is_mended:
                self._waiting_for_a_person.remove(who)
                self._again_at[who] = now + PERSON_S
            return
        if who in self._again_at:
            if now >= self._again_at[who]:
                del self._again_at[who]
                self.start(who)
            return
        code = self.processes[who].poll()
        if code is None:
            return
        self.codes[who].append(code)
        if code == 0 or (SERVER in self._gone and who != SERVER):
            self._gone.add(who)
        elif code in AGAIN:
            self._again_at[who] = now + RESTART_S
        else:
            self._observed.hands[who] += 1
            if who in self.case.by_hand:
                self._waiting_for_a_person.add(who)
            else:
                self._gone.add(who)

    def _observe(self) -> None:
        """Write down what is left, once every process has ended or was killed."""
        self.end_processes()
        seen = self._observed
        seen.codes, seen.logs = dict(self.codes), {who: self.log(who) for who in EVERYONE}
        steps = [step for step, _ in self._struck]
        seen.missed += [f"{step.who} never came to the point {step.point!r}" for step in self.case.steps
                        if step not in steps]
        seen.read(self.folder, self.seen(self.folder))

    def end_processes(self) -> None:
        """Kill all that still run."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
        deadline = time.monotonic() + 10
        while any(process.poll() is None for process in self.processes.values()) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)

    def close(self) -> None:
        """Kill all that still run, and let networks and disks go."""
        self.end_processes()
        for kept in (self.links, self.disks):
            if kept is not None:
                kept.close()


def _own_port() -> int:
    """Return a free port that no other case of this process was given: its server may not have listened yet."""
    while (port := free_port()) in _GIVEN:
        pass
    _GIVEN.add(port)
    return port


def _used(pid: int) -> tuple[int, int]:
    """Return how many threads and descriptors a process has; zeros if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0, 0
