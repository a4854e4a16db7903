"""A campaign of kills at named points after a charge: `python -m tests.kills [KILLS [SEED]]`, minutes for 60.

A real server, and a real client with a real ledger, policy and witness. The client is killed (SIGKILL) at a point that
its process was given, and started again, time after time. What the server has received is then held against the ledger.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.privacy import Ledger
from tests import processes
from tests.processes import FORKS, PATIENCE, Deployment, Forked, write_rows

BEFORE, AFTER, AMID = "before", "after", "amid"
_RESERVATION, _UPDATES = "fedlora.privacy.ledger.reservation:Reservation", "fedlora_client.state:FolderState"
POINTS: Mapping[str, tuple[str, str]] = {
    "before it begins": (f"{_RESERVATION}.begin", BEFORE),
    "once it has begun": (f"{_RESERVATION}.begin", AFTER),
    "during the training": ("fedlora.training.accumulation:PrivateStep.finish", BEFORE),
    "after the training": ("fedlora.training.trainer:Trainer.run", AFTER),
    "before the update is kept": (f"{_UPDATES}.save_upload", BEFORE),
    "before that is noted": (f"{_RESERVATION}.stored", BEFORE),
    "once that is noted": (f"{_RESERVATION}.stored", AFTER),
    "before the witness": ("fedlora.privacy.ledger.witnesses:write_witness", BEFORE),
    "after the witness": ("fedlora.privacy.ledger.witnesses:write_witness", AFTER),
    "before the release": (f"{_RESERVATION}.released", BEFORE),
    "after the release": (f"{_RESERVATION}.released", AFTER),
    "before sending": ("fedlora_client.connection:Connection.send", BEFORE),
    "while sending": ("fedlora_client.connection:Connection._answer_frames", AMID),
    "after sending": ("fedlora_client.connection:Connection.send", AFTER),
}
"""Name → function, and when in its call. Each comes once or more in a round, when its charge is on the disk."""

ROUNDS = 100
PLENTY = 200
"""An ε so large that its noise is found at once."""

AGREED = ("--yes",)
"""What a client of a real ledger is told where there is no terminal."""


def client_that_dies(point: str, occurrence: int, arguments: Sequence[str], log: Path,
                     environment: Mapping[str, str]) -> None:
    """fedlora-client, killed when it comes to `point` for the n-th time after its first charge."""
    where, when = POINTS[point]
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    original, charged, left = getattr(owner, name), [], [occurrence]

    def die() -> None:
        if charged:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    def dying(*arguments: Any, **named: Any) -> Any:
        if when == BEFORE:
            die()
        result = original(*arguments, **named)
        if when == AMID:
            return amid(result)
        if when == AFTER:
            die()
        return result

    def amid(frames: Any) -> Iterator[bytes]:
        for frame in frames:
            yield frame
            die()  # gRPC has it, and asks for the next one

    setattr(owner, name, dying)
    reserve = Ledger.reserve

    def reserving(self: Ledger, *arguments: Any, **named: Any) -> Any:
        reservation = reserve(self, *arguments, **named)
        charged.append(reservation)
        return reservation

    Ledger.reserve = reserving  # type: ignore[method-assign]
    processes._run("client", arguments, log, environment)


def server_that_tells(told: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """fedlora-server, which writes down the SHA-256 of every update that it has received whole."""
    from fedlora.wire import tensors_digest
    from fedlora_server.upload_store import IncomingUpload, read_record
    from fedlora_strategies.messages import to_tensors

    stored = IncomingUpload.stored

    def telling(self: Any, metrics: Any) -> Any:
        found = stored(self, metrics)
        tensors = to_tensors(read_record(memoryview(found.path.read_bytes()), found.shapes, found.wire_dtype))
        with told.open("a") as lines:
            lines.write(json.dumps([tensors_digest(tensors), dict(metrics)]) + "\n")
        return found

    IncomingUpload.stored = telling  # type: ignore[method-assign]
    processes._run("server", arguments, log, environment)


class Started(Forked):
    """A process that runs one of the functions above."""

    def __init__(self, function: Callable[..., None], log: Path, *arguments: object,
                 environment: Mapping[str, str]) -> None:
        log.write_bytes(b"")
        words = [str(argument) for argument in arguments]
        self._process = FORKS.Process(target=function, args=(words, log, environment), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid


@dataclass(frozen=True)
class Counted:
    """What has left, and what was charged.

    Attributes:
        left: SHA-256 of the distinct updates that the server has received.
        charges: trainings charged; released: SHA-256 of those charged whose update was released.
        states: of the charges.
    """

    left: frozenset[str]
    charges: int
    released: frozenset[str]
    states: Counter

    def check(self) -> None:
        """Nothing has left that is not charged, and each update has a charge of its own."""
        assert self.left <= self.released, f"{len(self.left - self.released)} updates left that the ledger lacks"
        assert len(self.left) <= self.charges


class Campaign:
    """One run, whose client north dies and is started again."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.deployment = folder, Deployment(folder, checkpoint)
        self.data = write_rows(folder / "data" / "north.jsonl", seed=0)
        self.told, self.home = folder / "told", self.deployment.home("north")
        self._user = {"COLUMNS": "200", "XDG_STATE_HOME": str(self.home / "state"),
                      "XDG_CONFIG_HOME": str(self.home / "config")}
        self.deployment.processes["server"] = Started(
            partial(server_that_tells, self.told), folder / "server.log", "--model", checkpoint, "--address",
            self.deployment.address, "--out", self.deployment.out, "--min-clients", 1, "--rounds", ROUNDS, "--labels",
            "routine,urgent", "--rank", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16,
            environment={"COLUMNS": "200"})

    def live(self, point: str | None, occurrence: int = 1) -> None:
        """Start north, which dies at the point, if there is one."""
        function = partial(client_that_dies, point, occurrence) if point else partial(processes._run, "client")
        self.deployment.processes["north"] = Started(
            function, self.folder / "north.log", "--data", self.data, "--name", "north", "--server",
            self.deployment.address, "--model", self.deployment.checkpoint, "--state", self.folder / "state",
            "--threads", 1, "--device", "cpu", "--precision", "fp32", "--epsilon", PLENTY, "--declared-size", 120,
            *AGREED, environment=self._user)

    def die(self, point: str, occurrence: int = 1) -> Counted:
        """Start north and wait until it was killed; what has left and what was charged then."""
        self.live(point, occurrence)
        code = self.deployment.end("north")
        assert code == -signal.SIGKILL, f"{point}: ended with {code}\n{self.deployment.log('north')}"
        return self.counted()

    def counted(self) -> Counted:
        lines = [json.loads(line) for line in self.told.read_text().splitlines()] if self.told.exists() else []
        path = self.home / "state" / "fedlora" / "ledger.sqlite"
        charges = []
        if path.exists():
            ledger = Ledger(path)
            charges = [charge for charge in ledger.charges() if charge.state != "voided"]
            ledger.close()
        return Counted(frozenset(line[0] for line in lines), len(charges),
                       frozenset(charge.sha256 for charge in charges if charge.state == "released" and charge.sha256),
                       Counter(charge.state for charge in charges))

    def go_on(self, updates: int) -> None:
        """Wait until so many further distinct updates have left, or north has ended."""
        least = len(self.counted().left) + updates
        deadline = time.monotonic() + 60 * PATIENCE
        while len(self.counted().left) < least and self.deployment.processes["north"].poll() is None:
            assert time.monotonic() < deadline, self.deployment.log("north")
            time.sleep(0.1)

    def kill(self) -> None:
        self.deployment.processes["north"].send_signal(signal.SIGKILL)
        assert self.deployment.end("north") == -signal.SIGKILL

    def stop(self) -> Counted:
        """Have the coordinator stop the run, and both end as they should."""
        self.deployment.processes["server"].send_signal(signal.SIGINT)
        assert self.deployment.end("server") == 130, self.deployment.log("server")
        assert self.deployment.end("north") == 0, self.deployment.log("north")
        return self.counted()

    def snapshot(self) -> Path:
        """A copy of the user's ledger, policy and keys, and of the data with its witness."""
        copy = self.folder / "snapshot"
        shutil.copytree(self.home, copy / "home")
        shutil.copytree(self.data.parent, copy / "data")
        return copy

    def restore(self, copy: Path) -> None:
        """Put it back, all together."""
        for place, kept in ((self.home, "home"), (self.data.parent, "data")):
            shutil.rmtree(place)
            shutil.copytree(copy / kept, place)

    def close(self) -> None:
        self.deployment.__exit__()


def campaign(folder: Path, checkpoint: Path, kills: Sequence[tuple[str, int]]) -> Counted:
    """One run with these kills, (point, occurrence) each; ended by its coordinator after two more rounds."""
    run = Campaign(folder, checkpoint)
    try:
        for point, occurrence in kills:
            run.die(point, occurrence).check()
        run.live(None)
        run.go_on(2)
        counted = run.stop()
        counted.check()
        assert len(counted.left) >= 2 and counted.charges >= len(counted.left)
        return counted
    finally:
        run.close()


def restored_snapshot(folder: Path, checkpoint: Path) -> tuple[int | None, Counted, str]:
    """A client whose ledger, policy and witness are put back together to what they were two rounds ago.

    Returns:
        Its exit code, None if it went on until it was stopped; what has left and what its ledger says; its log.
    """
    run = Campaign(folder, checkpoint)
    try:
        for _ in range(2):  # of which the first is all that the snapshot knows
            run.live(None)
            run.go_on(2)
            run.kill()
            copy = run.folder / "snapshot"
            copy = copy if copy.exists() else run.snapshot()
        run.restore(copy)
        run.live(None)
        run.go_on(1)
        code = run.deployment.processes["north"].poll()
        if code is None:
            run.kill()
        return code, run.counted(), run.deployment.log("north")
    finally:
        run.close()


def plan_of_kills(count: int, seed: int) -> list[tuple[str, int]]:
    """Every point as often as any other, at its first to third occurrence."""
    choice = random.Random(seed)
    points = [list(POINTS)[i % len(POINTS)] for i in range(count)]
    choice.shuffle(points)
    return [(point, choice.randint(1, 3)) for point in points]


def main(count: int = 60, seed: int = 0, at_once: int = 12) -> None:
    from tests.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint("bert", Path(folder) / "model")
        kills, began = plan_of_kills(count, seed), time.monotonic()
        total = Counter()
        for number, start in enumerate(range(0, count, at_once)):
            counted = campaign(Path(folder) / str(number), checkpoint, kills[start:start + at_once])
            total += Counter({"kills": len(kills[start:start + at_once]), "left": len(counted.left),
                              "charges": counted.charges}) + counted.states
            print(f"{time.monotonic() - began:.0f} s: {dict(total)}", flush=True)
        code, counted, log = restored_snapshot(Path(folder) / "restored", checkpoint)
        print(f"a restored snapshot: exit code {code}, {len(counted.left)} distinct updates left, {counted.charges} "
              f"charges\n{log}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
