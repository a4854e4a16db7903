"""Real processes that sum securely over TLS: a server and clients that can be killed at named points.

Each client writes down the integers that it masks, and the server those that it opens. So a test can hold each opened
sum against the plain sum of the integers of those whose uploads are in it.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.privacy import Ledger
from fedlora_server.pki.authority import Authority
from tests import processes
from tests.identities import enrolled
from tests.kills import AFTER, BEFORE, PLENTY, Started, act_at, die
from tests.processes import Deployment, Process, write_rows

MEMBER, ROUND = "fedlora_client.sums:SumMember", "fedlora_server.sum_round:SumRound"

CLIENT_POINTS: Mapping[str, tuple[str, str]] = {
    "packages": (f"{MEMBER}._package", BEFORE),
    "training": ("fedlora.training.accumulation:SumStep._release", BEFORE),
    "upload": ("fedlora_client.sums:MaskedPart.masked", AFTER),
    "closing": (f"{MEMBER}._agreement", BEFORE),
    "reveals": (f"{MEMBER}._reveal", BEFORE),
}
"""Phase of a round in which a client is killed → function, and when in its call the kill comes."""

SERVER_POINTS: Mapping[str, tuple[str, str]] = {
    "before the cohort is stored": ("fedlora.secure_sum.collector:Collector.form_cohort", BEFORE),
    "once the cohort is stored": (f"{ROUND}._formed", AFTER),
    "while uploads come": ("fedlora.secure_sum.collector:Collector.add_upload", AFTER),
    "before the sum is closed": ("fedlora.secure_sum.collector:Collector.close", BEFORE),
    "once the sum is closed": (f"{ROUND}._agree", BEFORE),
    "while clients sign": ("fedlora.secure_sum.collector:Collector.add_signature", AFTER),
    "once clients have signed": (f"{ROUND}._reveal", BEFORE),
    "while shares come": ("fedlora.secure_sum.collector:Collector.add_reveal", AFTER),
    "once shares are revealed": (f"{ROUND}._reveal", AFTER),
    "once the sum is opened": (f"{ROUND}.collect", AFTER),
}
"""Point in the server → function, and when in its call the kill comes."""


def client_that_tells(told: Path, kill: tuple[str, int] | None, arguments: Sequence[str], log: Path,
                      environment: Mapping[str, str]) -> None:
    """Run fedlora-client, write down the integers that it masks, and kill it at a point's n-th occurrence, if given."""
    from fedlora_client.sums import MaskedPart

    masked, count, name = MaskedPart.masked, iter(range(10**6)), arguments[arguments.index("--name") + 1]

    def telling(self: Any, integers: np.ndarray) -> np.ndarray:
        _, number, attempt = self._attempt.key
        np.save(told / f"{name}-{number}-{attempt}-{next(count)}.npy", integers)
        return masked(self, integers)

    MaskedPart.masked = telling  # type: ignore[method-assign]
    if kill is not None:
        act_at(*CLIENT_POINTS[kill[0]], kill[1], lambda: True, die)
    processes._run("client", arguments, log, environment)


def server_that_tells(told: Path, kill: tuple[str, int] | None, arguments: Sequence[str], log: Path,
                      environment: Mapping[str, str]) -> None:
    """Run fedlora-server, write down each sum that it opens, and kill it at a point's n-th occurrence, if given."""
    from fedlora.secure_sum.collector import Collector

    opened = Collector.opened

    def telling(self: Any) -> np.ndarray | None:
        total = opened(self)
        if total is not None:
            place = told / f"opened-{self.attempt.round}-{self.attempt.attempt}"
            place.with_suffix(".json").write_text(json.dumps(self.held.survivors))
            np.save(place.with_suffix(".npy"), total)
        return total

    Collector.opened = telling  # type: ignore[method-assign]
    if kill is not None:
        act_at(*SERVER_POINTS[kill[0]], kill[1], lambda: True, die)
    processes._run("server", arguments, log, environment)


class SecureDeployment(Deployment):
    """A server and `members` clients with certificates, which sum securely.

    Args:
        folder: folder for everything.
        checkpoint: the base model.
        members: number of clients.
        options: further options of the server.

    Attributes:
        killed: name → the phase in which `start_members` has the client killed.
    """

    def __init__(self, folder: Path, checkpoint: Path, members: int, *options: object) -> None:
        super().__init__(folder, checkpoint)
        self.authority = Authority.create(folder / "pki", ["127.0.0.1"])
        self.names = [f"site-{number:02}" for number in range(members)]
        for number, name in enumerate(self.names):
            enrolled(self.authority, folder / "tls" / name, name)
            write_rows(folder / "rows" / name / "rows.jsonl", number)
        self.told = folder / "told"
        self.told.mkdir()
        self.killed: dict[str, str] = {}
        self.command = ("--secure-aggregation", "--tls", folder / "pki", "--min-clients", members, "--labels",
                        "routine,urgent", "--rank", 2, "--batch-size", 8, "--max-length", 16, "--targets", "query",
                        "--strategy", "fedavg-lora", *options)

    def serve(self, kill: tuple[str, int] | None = None) -> Process:
        """Start the server, or start it again by the same command, to be killed at a point if one is given."""
        self.processes["server"] = process = self._started(
            "server", partial(server_that_tells, self.told, kill), "--model", self.checkpoint, "--address",
            self.address, "--out", self.out, *self.command)
        return process

    def member(self, name: str, kill: tuple[str, int] | None = None, *options: object) -> Process:
        """Start a client with a real ledger, to be killed at a point if one is given."""
        self.processes[name] = process = self._started(
            name, partial(client_that_tells, self.told, kill), "--data", self.folder / "rows" / name / "rows.jsonl",
            "--name", name, "--server", self.address, "--model", self.checkpoint, "--state",
            self.folder / "state" / name, "--threads", 1, "--device", "cpu", "--precision", "fp32", "--epsilon", PLENTY,
            "--declared-size", 120, "--labels", "routine,urgent", "--tls", self.folder / "tls" / name, "--yes",
            *options)
        return process

    def start_members(self, phases: str = "") -> None:
        """Start all clients. The first are to be killed, one in each of these phases, whose names spaces part."""
        self.killed = dict(zip(self.names, phases.split(), strict=False))
        for name in self.names:
            self.member(name, (self.killed[name], 1) if name in self.killed else None)

    @property
    def alive(self) -> tuple[str, ...]:
        """Names of the clients that are not killed."""
        return tuple(name for name in self.names if name not in self.killed)

    @property
    def uploading(self) -> tuple[str, ...]:
        """Names of the clients that are not killed before they have uploaded."""
        return tuple(name for name in self.names if self.killed.get(name) in (None, "closing", "reveals"))

    def _started(self, name: str, function: Callable[..., None], *arguments: object) -> Process:
        home = self.home(name)
        return Started(function, self.folder / f"{name}.log", *arguments, environment={
            "COLUMNS": "200", "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")})

    def opened(self) -> dict[tuple[int, int], tuple[tuple[str, ...], np.ndarray]]:
        """Return (round, attempt) → the names in a sum that the server opened, and the sum."""
        found = {}
        for place in self.told.glob("opened-*.json"):
            number, attempt = map(int, place.stem.split("-")[1:])
            found[number, attempt] = tuple(json.loads(place.read_text())), np.load(place.with_suffix(".npy"))
        return found

    def masked(self) -> dict[tuple[str, int, int], list[np.ndarray]]:
        """Return (client, round, attempt) → every vector that the client has masked for it."""
        found: dict[tuple[str, int, int], list[np.ndarray]] = {}
        for place in self.told.glob("site-*.npy"):
            name, number, attempt = re.fullmatch(r"(site-\d+)-(\d+)-(\d+)-\d+", place.stem).groups()  # type: ignore[union-attr]
            found.setdefault((name, int(number), int(attempt)), []).append(np.load(place))
        return found

    def charges(self, name: str) -> list[Any]:
        """Return the charges in a client's ledger that were not voided."""
        path = self.home(name) / "state" / "fedlora" / "ledger.sqlite"
        if not path.exists():
            return []
        ledger = Ledger(path)
        try:
            return [charge for charge in ledger.charges() if charge.state != "voided"]
        finally:
            ledger.close()

    def check(self) -> dict[tuple[int, int], tuple[str, ...]]:
        """Assert that each opened sum is the plain sum of its clients' integers, bit for bit, and that all is charged.

        A client that was killed must have died, and is charged once it has begun to train, though it masked nothing.

        Returns:
            (round, attempt) → the names in the opened sum.
        """
        for name, phase in self.killed.items():
            assert self.end(name) == -signal.SIGKILL, self.log(name)
            assert len(self.charges(name)) == (phase != "packages"), f"{name} was killed in the phase {phase}"
        masked, opened = self.masked(), self.opened()
        for (name, number, attempt), vectors in masked.items():
            assert len(vectors) == 1, f"{name} masked {len(vectors)} vectors for round {number}, attempt {attempt}"
        for (number, attempt), (names, total) in opened.items():
            plain = np.sum([masked[name, number, attempt][0] for name in names], axis=0)
            assert np.array_equal(total, plain), f"the sum of round {number}, attempt {attempt} is not the plain one"
        for name in self.names:
            charged = {(charge.round, charge.attempt) for charge in self.charges(name)}
            assert charged >= {(number, attempt) for client, number, attempt in masked if client == name}
        return {key: names for key, (names, _) in opened.items()}
