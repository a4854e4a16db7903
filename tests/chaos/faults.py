"""What can happen to a federation. Each fault strikes, is mended, and says whether something has met it."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from fedlora.identity.certificates import parse_certificate, utc_now
from fedlora.identity.folder import CERTIFICATE
from fedlora_server.pki.authority import SERVER_NAME, Authority
from tests.chaos import clocks, links
from tests.chaos.federation import Federation
from tests.chaos.keepers import Guarded
from tests.chaos.links import Link
from tests.chaos.observed import SERVER
from tests.chaos.tested import place_of
from tests.kills import act_at, die

STOPPED_WITHIN_S = 2.0
RENEWED_KILLED_S = 20.0
NOTICED_S = 1.5
"""Seconds within which a server disconnects a client whose certificate has ended."""


class Fault(Protocol):
    """Something that happens to a federation."""

    def strike(self, run: Federation) -> str:
        """Let it happen. Return why it could not, or ""."""

    def felt(self, run: Federation) -> bool:
        """Return whether something met it so far."""

    def mend(self, run: Federation) -> None:
        """End it."""


@dataclass(frozen=True)
class Signal:
    """Processes get a signal. Those that are stopped by it go on when it is mended."""

    who: tuple[str, ...]
    number: signal.Signals

    def strike(self, run: Federation) -> str:
        gone = [one for one in self.who if not run.signal(one, self.number)]
        if self.number == signal.SIGSTOP:
            deadline = time.monotonic() + STOPPED_WITHIN_S
            while not all(map(_is_stopped, [run.processes[one].pid for one in self.who if one not in gone])):
                if time.monotonic() > deadline:
                    return "it did not stop"
                time.sleep(0.01)
        return f"{', '.join(gone)} had ended already" if gone else ""

    def felt(self, run: Federation) -> bool:
        return True

    def mend(self, run: Federation) -> None:
        if self.number == signal.SIGSTOP:
            for one in self.who:
                run.signal(one, signal.SIGCONT)

    def __str__(self) -> str:
        return f"{self.number.name} to {' and '.join(self.who)}"


@dataclass(frozen=True)
class Weather:
    """The links of clients are not what they should be."""

    who: tuple[str, ...]
    link: Link

    def strike(self, run: Federation) -> str:
        assert run.links is not None
        for one in self.who:
            run.links.set(one, self.link)
        return ""

    def felt(self, run: Federation) -> bool:
        assert run.links is not None
        return all(map(run.links.disturbed, self.who))

    def mend(self, run: Federation) -> None:
        assert run.links is not None
        for one in self.who:
            run.links.set(one, links.GOOD)

    def __str__(self) -> str:
        return f"{self.link} for {' and '.join(self.who)}"


@dataclass(frozen=True)
class Disk:
    """The disk of a process is full, or read-only for what is opened from now on."""

    who: str
    what: str  # "full" or "read-only"

    def strike(self, run: Federation) -> str:
        assert run.disks is not None
        run.disks.do(self.who, "fill" if self.what == "full" else "close")
        wanted = errno.ENOSPC if self.what == "full" else errno.EROFS
        probe = run.seen(run.folder / self.who / "probe")
        try:
            probe.write_bytes(bytes(8192))
        except OSError as error:
            found = error.errno
        else:
            found = 0
        if self.what == "full":
            probe.unlink(missing_ok=True)
        return "" if found == wanted else f"the disk took a file ({os.strerror(found) if found else 'no error'})"

    def felt(self, run: Federation) -> bool:
        return re.search("No space left|disk is full|has room for|Read-only", run.log(self.who)) is not None

    def mend(self, run: Federation) -> None:
        assert run.disks is not None
        run.disks.do(self.who, "empty" if self.what == "full" else "open")

    def __str__(self) -> str:
        return f"the disk of {self.who} is {self.what}"


@dataclass(frozen=True)
class Clock:
    """The clocks of processes jump, and back when that is mended."""

    who: tuple[str, ...]
    ahead: timedelta

    def strike(self, run: Federation) -> str:
        for one in self.who:
            clocks.set_clock(run.clock(one), self.ahead.total_seconds())
        if run.processes:
            time.sleep(clocks.LOOKS_EVERY_S + 0.2)  # until every process has seen it
        return ""

    def felt(self, run: Federation) -> bool:
        return True

    def mend(self, run: Federation) -> None:
        for one in self.who:
            clocks.set_clock(run.clock(one), 0.0)

    def __str__(self) -> str:
        return f"the clock of {' and '.join(self.who)} is {self.ahead} ahead"


@dataclass(frozen=True)
class Renewal:
    """The coordinator renews a certificate, and its owner puts it into place. The running processes are left alone.

    Attributes:
        who: whose.
        killed: the command that renews it is killed once it has written the certificate, and given again.
    """

    who: str
    killed: bool = False

    def strike(self, run: Federation) -> str:
        folder, at = run.identity(SERVER), SERVER_NAME if self.who == SERVER else self.who
        before = (run.identity(self.who) / CERTIFICATE).read_bytes()
        if self.killed:
            dying = Guarded(_renew_and_die, folder, at)
            deadline = time.monotonic() + RENEWED_KILLED_S
            while dying.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            if dying.poll() != -signal.SIGKILL:
                return f"the renewal ended with {dying.poll()}"
        renewed = Authority.open(folder).renew(at, days=90).pem
        if self.who != SERVER:
            (run.identity(self.who) / CERTIFICATE).write_bytes(renewed)
        return "" if (run.identity(self.who) / CERTIFICATE).read_bytes() != before else "the certificate is the old one"

    def felt(self, run: Federation) -> bool:
        return True

    def mend(self, run: Federation) -> None:
        """Do nothing: a renewed certificate stays."""

    def __str__(self) -> str:
        return f"the certificate of {self.who} is renewed"


@dataclass(frozen=True)
class ShortLived:
    """A certificate is replaced by one that ends soon."""

    who: str
    for_s: float = 10.0

    def strike(self, run: Federation) -> str:
        at = SERVER_NAME if self.who == SERVER else self.who
        begins = utc_now() - timedelta(days=1) + timedelta(seconds=self.for_s)
        old = Authority.open(run.identity(SERVER)).renew(at, days=1, now=begins).pem
        if self.who != SERVER:
            (run.identity(self.who) / CERTIFICATE).write_bytes(old)
        return ""

    def felt(self, run: Federation) -> bool:
        return True

    def mend(self, run: Federation) -> None:
        """Do nothing: it ends (`Lapsed`)."""

    def __str__(self) -> str:
        return f"the certificate of {self.who} ends soon"


@dataclass(frozen=True)
class Lapsed:
    """A short-lived certificate has ended, and is renewed when that is mended."""

    who: str

    def strike(self, run: Federation) -> str:
        path = run.identity(self.who) / CERTIFICATE
        while not parse_certificate(path.read_bytes()).why_invalid(utc_now()):
            time.sleep(0.1)
        time.sleep(NOTICED_S)
        return ""

    def felt(self, run: Federation) -> bool:
        return "expired" in run.log(self.who) or "expired" in run.log(SERVER)

    def mend(self, run: Federation) -> None:
        Renewal(self.who).strike(run)

    def __str__(self) -> str:
        return f"the certificate of {self.who} has ended"


@dataclass(frozen=True)
class Damage:
    """A file of an identity is half of what it was, and whole again when that is mended."""

    who: str
    file: str = CERTIFICATE
    _whole: dict[Path, bytes] = field(default_factory=dict, compare=False, repr=False)

    def strike(self, run: Federation) -> str:
        path = run.identity(self.who) / self.file
        self._whole[path] = path.read_bytes()
        path.write_bytes(self._whole[path][:len(self._whole[path]) // 2])
        return ""

    def felt(self, run: Federation) -> bool:
        return True

    def mend(self, run: Federation) -> None:
        for path, content in self._whole.items():
            if path.is_relative_to(run.identity(self.who)):
                path.write_bytes(content)

    def __str__(self) -> str:
        return f"half of {self.file} of {self.who} is missing"


def _renew_and_die(folder: Path, name: str) -> None:
    act_at(*place_of("once a certificate is issued"), 1, lambda: True, die)
    Authority.open(folder).renew(name)


def _is_stopped(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "\nState:\tT" in status


