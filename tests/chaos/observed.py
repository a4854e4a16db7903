"""What is left of a run: the adapter, the rounds, the ledgers, and whatever else lies about."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.privacy import Ledger
from tests.chaos.disks import BALLAST

SERVER, CLIENTS = "server", ("north", "south", "east")
EVERYONE = (SERVER, *CLIENTS)


@dataclass
class Observed:
    """The outcome of a run.

    Attributes:
        seconds: from the first process's start to the last one's end.
        in_time: whether all processes ended within the case's limit.
        codes: name → the exit codes of its processes, one after the other.
        hands: how often a person had to start a process again, by name.
        untold: clients that did not learn that the run had ended.
        adapter: the adapter's bytes; empty if there is none.
        rounds: for each finished round, who uploaded in time.
        left: SHA-256 of each distinct update that the server received in full.
        released: SHA-256 of each update that a ledger records as released.
        charges: client → number of trainings charged in its ledger.
        trainings: client → number of trainings that its processes began.
        files: files that lie in the processes' folders, names of runs and uploads made equal.
        most: name → most (threads, descriptors) seen.
        missed: faults that did not strike, each with why.
        logs: name → all that its processes wrote.
    """

    seconds: float = 0.0
    in_time: bool = False
    codes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    hands: Counter[str] = field(default_factory=Counter)
    untold: tuple[str, ...] = ()
    adapter: bytes = b""
    rounds: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    left: frozenset[str] = frozenset()
    released: frozenset[str] = frozenset()
    charges: Mapping[str, int] = field(default_factory=dict)
    trainings: Mapping[str, int] = field(default_factory=dict)
    files: frozenset[str] = frozenset()
    most: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    logs: Mapping[str, str] = field(default_factory=dict)

    @property
    def tracebacks(self) -> tuple[str, ...]:
        """Names of the processes whose log has a traceback."""
        return tuple(who for who, log in self.logs.items() if "Traceback" in log)

    def read(self, folder: Path, seen: Path) -> None:
        """Read what the processes, which have all ended, have left.

        Args:
            folder: the run's folder.
            seen: the same, by the path at which the processes' own folders are found.
        """
        run = seen / SERVER / "run"
        adapter, lines = run / "adapter" / "adapter_model.safetensors", run / "metrics.jsonl"
        self.adapter = adapter.read_bytes() if adapter.exists() else b""
        records = map(json.loads, lines.read_text().splitlines() if lines.exists() else ())
        self.rounds = {record["round"]: tuple(record["uploaded"]) for record in records if record["round"]}
        self.left = frozenset(json.loads(line)[0] for line in lines_of(folder / f"{SERVER}.told"))
        self.files = frozenset(_plain(path.relative_to(seen)) for who in EVERYONE
                               for path in (seen / who).rglob("*") if path.is_file() and path.name != BALLAST)
        for who in CLIENTS:
            kept, copy = seen / who / "home" / "state" / "fedlora", folder / f"{who}.ledger"
            if kept.exists():
                shutil.copytree(kept, copy)  # SQLite would not find it by the path through /proc
            charged, released = charges(copy / "ledger.sqlite")
            self.charges = {**self.charges, who: charged}
            self.released |= released
            self.trainings = {**self.trainings, who: len(lines_of(folder / f"{who}.told"))}


def charges(ledger: Path) -> tuple[int, frozenset[str]]:
    """Return how many trainings a ledger has charged, and the SHA-256 of each update that it records as released."""
    if not ledger.exists():
        return 0, frozenset()
    opened = Ledger(ledger)
    try:
        kept = [charge for charge in opened.charges() if charge.state != "voided"]
    finally:
        opened.close()
    return len(kept), frozenset(charge.sha256 for charge in kept if charge.state == "released" and charge.sha256)


def lines_of(file: Path) -> list[str]:
    """Return a file's lines; none if it is not there."""
    return file.read_text().splitlines() if file.exists() else []


def _plain(path: Path) -> str:
    """Return a file's path with names of runs and uploads, which differ from run to run, made equal."""
    return re.sub(r"\b[0-9a-f]{16,}\b", "*", str(path))
