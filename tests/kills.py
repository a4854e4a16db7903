"""A campaign of kills at named points in the code: `python -m tests.kills [KILLS [SEED]]`, minutes for 60 kills.

It runs a real server, and a real client with a real ledger, policy and witness. Two thirds of the kills (SIGKILL) hit
the client, at points after a charge; then all that the server has received is compared with the ledger. The others hit
the server, which is started again by the same command each time; its run must end with the adapter of a run without
kills.
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
    "after the training": ("fedlora.training.trainer:Trainer.train", AFTER),
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
"""Name of a point in the client → function, and when in its call the kill comes.

Each point is passed at least once in a round, after the round's charge is on the disk.
"""

_CHECKPOINT, _UPLOAD = "fedlora_server.checkpoint", "fedlora_server.upload_store:IncomingUpload"
SERVER_POINTS: Mapping[str, tuple[str, str]] = {
    "before it listens": ("fedlora_server.app:prepare", BEFORE),
    "before the run is written": (f"{_CHECKPOINT}:begin", BEFORE),
    "once the run is written": (f"{_CHECKPOINT}:begin", AFTER),
    "before it asks": (f"{_CHECKPOINT}:remember", BEFORE),
    "once it has noted whom it asks": (f"{_CHECKPOINT}:remember", AFTER),
    "while an upload comes": (f"{_UPLOAD}.write", BEFORE),
    "once an upload is stored": (f"{_UPLOAD}.stored", AFTER),
    "before a round's line": (f"{_CHECKPOINT}:note", BEFORE),
    "before a round's checkpoint": (f"{_CHECKPOINT}:save", BEFORE),
    "once a round's checkpoint is written": (f"{_CHECKPOINT}:save", AFTER),
    "before the report": ("fedlora_server.app:write_report", BEFORE),
    "before the report, after the adapter": ("fedlora_server.report:describe", BEFORE),
    "once the report is written": ("fedlora_server.app:write_report", AFTER),
}
"""The points in the server, as in `POINTS`. A server passes some of them only once, the last three at its run's end."""

ROUNDS = 100
SERVED_ROUNDS = 8
PLENTY = 200
"""An ε so large that calibrating its noise takes no time."""

AGREED = ("--yes",)
"""Options that a client with a real ledger needs if there is no terminal."""


def client_that_dies(point: str, occurrence: int, arguments: Sequence[str], log: Path,
                     environment: Mapping[str, str]) -> None:
    """Run fedlora-client, and kill it at `point`, the n-th time it passes it after its first charge."""
    act_at(*POINTS[point], occurrence, charges_seen(), die)
    processes._run("client", arguments, log, environment)


def charges_seen() -> Callable[[], bool]:
    """Return a function that tells whether this process has charged a training yet."""
    charged: list[object] = []
    reserve = Ledger.reserve

    def reserving(self: Ledger, *arguments: Any, **named: Any) -> Any:
        reservation = reserve(self, *arguments, **named)
        charged.append(reservation)
        return reservation

    Ledger.reserve = reserving  # type: ignore[method-assign]
    return lambda: bool(charged)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def server_that_dies(point: str, occurrence: int, arguments: Sequence[str], log: Path,
                     environment: Mapping[str, str]) -> None:
    """Run fedlora-server, and kill it at `point`, the n-th time it passes it."""
    act_at(*SERVER_POINTS[point], occurrence, lambda: True, die)
    processes._run("server", arguments, log, environment)


def found(where: str) -> tuple[Any, str]:
    """Return the object that has a point's function as an attribute, and the attribute's name."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    return owner, name


def act_at(where: str, when: str, occurrence: int, counts: Callable[[], bool], act: Callable[[], object]) -> None:
    """Have this process call `act` in the n-th call of a function. Calls are counted while `counts()` is true."""
    owner, name = found(where)
    original, left = getattr(owner, name), [occurrence]

    def pass_by() -> None:
        if counts():
            left[0] -= 1
            if not left[0]:
                act()

    def passing(*arguments: Any, **named: Any) -> Any:
        if when == BEFORE:
            pass_by()
        result = original(*arguments, **named)
        if when == AMID:
            return amid(result)
        if when == AFTER:
            pass_by()
        return result

    def amid(frames: Any) -> Iterator[bytes]:
        for frame in frames:
            yield frame
            pass_by()  # gRPC has taken this frame and asks for the next

    setattr(owner, name, passing)


def server_that_tells(told: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run fedlora-server, and have it write down the SHA-256 of every update that it has received in full."""
    tell_of_uploads(told)
    processes._run("server", arguments, log, environment)


def tell_of_uploads(told: Path) -> None:
    """Have this process, a server, write down the SHA-256 and the numbers of every update that it has received."""
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
    """The updates that have left the client, and the trainings that its ledger has charged.

    Attributes:
        left: SHA-256 of each distinct update that the server has received.
        charges: number of trainings charged.
        released: SHA-256 of each update that the ledger records as released.
        states: the states of the charges.
    """

    left: frozenset[str]
    charges: int
    released: frozenset[str]
    states: Counter

    def check(self) -> None:
        """Assert that every update that has left is charged, each by its own charge."""
        assert self.left <= self.released, f"{len(self.left - self.released)} updates left that the ledger lacks"
        assert len(self.left) <= self.charges


class Campaign:
    """One run, whose client north is killed and started again."""

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
        """Start north, to be killed at the point if one is given."""
        function = partial(client_that_dies, point, occurrence) if point else partial(processes._run, "client")
        self.deployment.processes["north"] = Started(
            function, self.folder / "north.log", "--data", self.data, "--name", "north", "--server",
            self.deployment.address, "--model", self.deployment.checkpoint, "--state", self.folder / "state",
            "--threads", 1, "--device", "cpu", "--precision", "fp32", "--epsilon", PLENTY, "--declared-size", 120,
            *AGREED, environment=self._user)

    def die(self, point: str, occurrence: int = 1) -> Counted:
        """Start north, wait until it is killed, and return what had left and what was charged by then."""
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
        """Wait until so many more distinct updates have left, or north has ended."""
        least = len(self.counted().left) + updates
        deadline = time.monotonic() + 60 * PATIENCE
        while len(self.counted().left) < least and self.deployment.processes["north"].poll() is None:
            assert time.monotonic() < deadline, self.deployment.log("north")
            time.sleep(0.1)

    def kill(self) -> None:
        self.deployment.processes["north"].send_signal(signal.SIGKILL)
        assert self.deployment.end("north") == -signal.SIGKILL

    def stop(self) -> Counted:
        """Stop the run as its coordinator would, and check that both processes end as they should."""
        self.deployment.processes["server"].send_signal(signal.SIGINT)
        assert self.deployment.end("server") == 130, self.deployment.log("server")
        assert self.deployment.end("north") == 0, self.deployment.log("north")
        return self.counted()

    def snapshot(self) -> Path:
        """Copy the user's ledger, policy and keys, and the data with its witness. Return the copy's folder."""
        copy = self.folder / "snapshot"
        shutil.copytree(self.home, copy / "home")
        shutil.copytree(self.data.parent, copy / "data")
        return copy

    def restore(self, copy: Path) -> None:
        """Put a snapshot back, all of it."""
        for place, kept in ((self.home, "home"), (self.data.parent, "data")):
            shutil.rmtree(place)
            shutil.copytree(copy / kept, place)

    def close(self) -> None:
        self.deployment.__exit__()


def campaign(folder: Path, checkpoint: Path, kills: Sequence[tuple[str, int]]) -> Counted:
    """Run with these kills, (point, occurrence) each, and have the coordinator end the run after two more rounds."""
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


def server_campaign(folder: Path, checkpoint: Path, kills: Sequence[tuple[str, int]]) -> int:
    """Run a server that is killed at these points, (point, occurrence) each, and started again by the same command.

    Returns:
        How many of the points it passed before its run ended.
    """
    adapters, died = [], 0
    for name in ("whole", "broken"):
        (folder / name).mkdir(parents=True)
        deployment = Deployment(folder / name, checkpoint)
        with deployment:
            for seed, client in enumerate(("north", "south")):
                deployment.client(client, write_rows(folder / name / f"{client}.jsonl", seed), "--epsilon", PLENTY,
                                  seed=seed)
            command = ("--model", checkpoint, "--address", deployment.address, "--out", deployment.out,
                       "--min-clients", 2, "--min-replies", 2, "--rounds", SERVED_ROUNDS, "--labels", "routine,urgent",
                       "--rank", 2, "--local-steps", 2, "--batch-size", 8, "--max-length", 16, "--seed", 5)
            for point, occurrence in kills if name == "broken" else ():
                deployment.processes["server"] = Started(
                    partial(server_that_dies, point, occurrence), folder / name / "server.log", *command,
                    environment={"COLUMNS": "200", "XDG_STATE_HOME": str(deployment.home("server"))})
                code = deployment.end("server")
                if code == 0:
                    break
                assert code == -signal.SIGKILL, f"{point}: ended with {code}\n{deployment.log('server')}"
                died += 1
            else:
                deployment.processes["server"] = Started(
                    partial(processes._run, "server"), folder / name / "server.log", *command,
                    environment={"COLUMNS": "200", "XDG_STATE_HOME": str(deployment.home("server"))})
                assert deployment.end("server") == 0, deployment.log("server")
            for client in ("north", "south"):
                assert deployment.end(client) == 0, deployment.log(client)
            adapters.append((deployment.out / "adapter" / "adapter_model.safetensors").read_bytes())
            lines = [json.loads(line) for line in (deployment.out / "metrics.jsonl").read_text().splitlines()]
            assert [line["round"] for line in lines if line["round"]] == list(range(1, SERVED_ROUNDS + 1))
    assert adapters[0] == adapters[1], "the adapter of a server that was killed is another"
    return died


def restored_snapshot(folder: Path, checkpoint: Path) -> tuple[int | None, Counted, str]:
    """Run a client, and restore its ledger, policy and witness together to their state of two rounds ago.

    Returns:
        The client's exit code (None if it went on until it was stopped), what had left and was charged, and its log.
    """
    run = Campaign(folder, checkpoint)
    try:
        for _ in range(2):  # the snapshot knows only of the first
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
    """Return `count` kills at the client's points, each point equally often, at its first to third occurrence."""
    choice = random.Random(seed)
    points = [list(POINTS)[i % len(POINTS)] for i in range(count)]
    choice.shuffle(points)
    return [(point, choice.randint(1, 3)) for point in points]


def plan_of_server_kills(count: int) -> list[tuple[str, int]]:
    """Return `count` kills at the server's points, each point equally often, at its first occurrence.

    The points at the end of a run come last.
    """
    points = [list(SERVER_POINTS)[i % len(SERVER_POINTS)] for i in range(count)]
    return [(point, 1) for point in sorted(points, key=lambda point: "report" in point)]


def main(count: int = 60, seed: int = 0, at_once: int = 12) -> None:
    from tests.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint("bert", Path(folder) / "model")
        of_servers, began = count // 3, time.monotonic()
        count -= of_servers
        kills, total = plan_of_kills(count, seed), Counter()
        for number, start in enumerate(range(0, of_servers, at_once)):
            some = plan_of_server_kills(of_servers)[start:start + at_once]
            total["kills of a server"] += server_campaign(Path(folder) / f"server-{number}", checkpoint, some)
            print(f"{time.monotonic() - began:.0f} s: {dict(total)}", flush=True)
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
