"""A long run over mutual TLS whose clients come and go: `python -m tests.soak [--rounds 500] [--clients 20]`.

A real fedlora-server, two real fedlora-clients with ledgers, and light clients that train nothing, each a process with
an identity of its own. From the warm-up on, clients are killed, leave, are revoked and come back, links are cut, and
certificates are renewed on both sides. Every process writes down what it holds (`tests.footprints`). At the end the
server and the clients that lived throughout must hold what they held after the warm-up: less than 1 KB of traced memory
more for each round, no descriptor and no thread more. pytest does not collect this file; `tests/test_soak.py` runs a
short one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedlora.identity.folder import CERTIFICATE
from fedlora.plan import Refused, Upload
from fedlora_client.connection import Connection, Goodbye, ServerUnreachable
from fedlora_client.tls import Tls, Untrusted
from fedlora_server.checkpoint import LINES
from fedlora_server.pki.authority import SERVER_NAME, Authority
from tests import footprints, processes
from tests.footprints import Footprint
from tests.identities import enrolled
from tests.kills import Started
from tests.processes import PATIENCE, free_port, write_rows
from tests.server.tcp_proxy import TcpProxy

MOST_GROWTH_BYTES = 1024
"""Largest growth of traced memory a round."""
SPARE_STREAM_THREADS = 8
"""Threads of the server's pool that may stay beyond one for each client: while a client comes back, its earlier stream
may still hold one."""
PLENTY = 2000
"""An ε so large that calibrating its noise takes no time."""
SMALL = ("--rank", 2, "--local-steps", 1, "--batch-size", 8, "--max-length", 16, "--targets", "query")
HOSTS = ["127.0.0.1"]


def rounds_in(out: Path) -> int:
    """Return how many rounds the run in this folder has finished."""
    try:
        return (out / LINES).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def watched(command: str, file: Path, out: Path, every: int, warm_up: int, arguments: Sequence[str], log: Path,
            environment: dict[str, str]) -> None:
    """Run a command, or a light client, in this forked process, and have it write down what it holds."""
    footprints.watch(file, partial(rounds_in, out), every, warm_up)
    if command == "light":
        with log.open("a") as text:
            os.dup2(text.fileno(), 1)
            os.dup2(text.fileno(), 2)
        light(*arguments)
    processes._run(command, arguments, log, environment)


def light(address: str, name: str, folder: str) -> None:
    """Take part as a client that sends back what it was sent, until the run ends; ends with fedlora-client's codes."""
    connection = Connection(address, name, private=True, tls=Tls(Path(folder)), connect_timeout_s=60,
                            report=lambda line: print(line, flush=True))
    signal.signal(signal.SIGTERM, lambda *_: connection.leave())
    code = 0
    try:
        connection.join()
        connection.ready()
        while True:
            plan, tensors = connection.next_request()
            trained = {name: array for name, array in tensors.items() if not name.endswith(".A")}
            connection.send(Upload(*plan.key, tensors=trained, steps=plan.run.local_steps, delta=1e-5,
                                   noise_multiplier=1.0))
    except Goodbye as goodbye:
        print("goodbye:", goodbye)
    except (Untrusted, Refused) as error:
        print(error)
        code = 4
    except ServerUnreachable as error:
        print(error)
        code = 3
    sys.stdout.flush()
    os._exit(code)


@dataclass
class Soak:
    """One run, its processes, and what is done to them.

    Attributes:
        folder: where everything is kept.
        checkpoint: the base model.
        rounds: rounds of the run.
        clients: how many clients.
        real: how many of them are fedlora-client with data and a ledger; the first one lives throughout.
        every: rounds from one footprint, and from one event, to the next.
        warm_up: rounds before the first event.
        done: how often each event came.
    """

    folder: Path
    checkpoint: Path
    rounds: int
    clients: int
    real: int
    every: int
    warm_up: int
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.address, self.out = f"127.0.0.1:{free_port()}", self.folder / "run"
        self.authority = Authority.create(self.folder / "pki", HOSTS)
        self.names = ["north", "south", *(f"client-{number:02}" for number in range(2, self.clients))]
        self.running: dict[str, Started] = {}
        self.link = TcpProxy(self.address)
        for name in self.names:
            enrolled(self.authority, self.folder / "identities" / name, name)

    @property
    def steady(self) -> tuple[str, ...]:
        """The processes that live throughout: the server, a real client and a light one."""
        return ("server", self.names[0], self.names[-1])

    def prints(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def start(self, name: str) -> None:
        """Start the server or a client, as the first time or again by the same command."""
        if name == "server":
            command, words = "server", (
                "--model", self.checkpoint, "--address", self.address, "--tls", self.authority.folder, "--out",
                self.out, "--strategy", "ffa-lora", "--labels", "routine,urgent", "--rounds", self.rounds,
                "--min-clients", self.clients, "--clients-per-round", max(2, self.clients // 3), "--min-replies", 2,
                "--round-timeout", 30, "--track", "no-plots", *SMALL)
        elif name in self.names[:self.real]:
            command, words = "client", (
                "--data", write_rows(self.folder / "data" / name / "rows.jsonl", len(name)), "--server",
                self.link.address if name == self.names[0] else self.address, "--model", self.checkpoint,
                "--tls", self.identity(name), "--state", self.folder / "state" / name, "--threads", 1, "--device",
                "cpu", "--precision", "fp32", "--epsilon", PLENTY, "--declared-size", 120, "--labels", "routine,urgent",
                "--yes", "--connect-timeout", 60)
        else:
            command, words = "light", (self.address, name, self.identity(name))
        home = self.folder / "home" / name
        self.running[name] = Started(
            partial(watched, command, self.prints(name), self.out, self.every, self.warm_up),
            self.folder / f"{name}.log", *words, environment={
                "COLUMNS": "200", "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")})

    def identity(self, name: str) -> Path:
        return self.folder / "identities" / name

    def end(self, name: str, number: int, *expected: int) -> None:
        """Send a signal, wait, and note an exit code that was not expected."""
        process = self.running.pop(name)
        if number:
            process.send_signal(number)
        code = process.wait(30 * PATIENCE)
        if code not in expected:
            self.faults.append(f"{name} ended with {code}: {self.last_line(name)}")

    def last_line(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text().strip().splitlines()
        return lines[-1] if lines else "(no word)"

    def renew(self, name: str, days: int) -> None:
        renewed = self.authority.renew(name, days=days)
        if name != SERVER_NAME:
            (self.identity(name) / CERTIFICATE).write_bytes(renewed.pem)

    def events(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield what is done to the run, over and over: each client that is taken away comes back with the next event.

        The processes that live throughout only have their links cut and their certificates renewed.
        """
        others = cycle([name for name in self.names if name not in self.steady])
        for turn in cycle(range(3650)):
            first, second, third = next(others), next(others), next(others)
            days = 40 + turn

            def cut() -> None:
                self.link.cut()
                time.sleep(0.3)
                self.link.restore()

            yield "killed", partial(self.end, first, signal.SIGKILL, -signal.SIGKILL)
            yield "returned", partial(self.come_back, first)
            yield "server renewed", partial(self.renew, SERVER_NAME, days)
            yield "client renewed", partial(self.renew, self.names[0], days)
            yield "link cut", cut
            yield "left", partial(self.end, second, signal.SIGTERM, 0, 130)
            yield "client renewed", partial(self.renew, second, days)
            yield "returned", partial(self.come_back, second)
            yield "revoked", partial(self.revoke, third)
            yield "enrolled again", partial(self.come_back, third)

    def revoke(self, name: str) -> None:
        self.authority.revoke(name)
        self.end(name, 0, 4)

    def away(self) -> list[str]:
        return [name for name in self.names if name not in self.running]

    def come_back(self, name: str) -> None:
        """Start a client that is away; one that was revoked enrolls with a new key first."""
        if name not in self.authority.listed():
            shutil.rmtree(self.identity(name))
            enrolled(self.authority, self.identity(name), name)
        self.start(name)

    def run(self, told: Callable[[str], None]) -> float:
        """Run to the end, and return the seconds from the first round to the last."""
        for name in ("server", *self.names):
            self.start(name)
        began, events, next_at = 0.0, self.events(), self.warm_up
        quiet_from = self.rounds - max(2 * self.every, 3)
        while self.running["server"].poll() is None:
            done = rounds_in(self.out)
            began = began or (time.monotonic() if done else 0.0)
            if next_at <= done < quiet_from:
                what, event = next(events)
                event()
                self.done[what] += 1
                next_at = done + max(1, self.every // 2)
                told(f"round {done} of {self.rounds}: {what}")
            elif done >= quiet_from and next_at < self.rounds:
                next_at = self.rounds
                for name in self.away():
                    self.come_back(name)
            self.mourn()
            time.sleep(0.02)
        seconds = time.monotonic() - began
        self.end("server", 0, 0)
        for name in list(self.running):
            self.end(name, 0, 0)
        return seconds

    def mourn(self) -> None:
        """Note the clients that ended though nobody ended them, and start them again."""
        for name in [name for name, process in self.running.items() if name != "server"]:
            code = self.running[name].poll()
            if code not in (None, 0):
                self.faults.append(f"{name} ended by itself with {code}: {self.last_line(name)}")
                self.running.pop(name)
                self.start(name)

    def close(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def judged(self) -> dict[str, list[Footprint]]:
        """Return the footprints of the processes that lived throughout, from just before the first event."""
        first = self.warm_up - 2 * self.every
        return {name: [one for one in footprints.read(self.prints(name)) if one.round >= first]
                for name in self.steady}


def faults_of(name: str, found: Sequence[Footprint], clients: int) -> Iterator[str]:
    """Yield which bounds a process has broken."""
    if len(found) < 2:
        yield f"{name}: only {len(found)} footprints after the warm-up"
        return
    slope = footprints.growth(found)
    if slope > MOST_GROWTH_BYTES:
        yield f"{name}: traced memory grows by {slope:,.0f} bytes a round"
    if more := footprints.left_over(found, lambda one: one.descriptors):
        yield f"{name}: descriptors are left: {more}"
    more = footprints.left_over(found, lambda one: one.threads)
    if more.get("fedlora-stream") and found[-1].threads["fedlora-stream"] <= clients + SPARE_STREAM_THREADS:
        del more["fedlora-stream"]
    if more:
        yield f"{name}: threads are left: {more}"


def table(judged: dict[str, list[Footprint]]) -> Table:
    """Return what each process held after the warm-up and at the end, and what the difference consists of."""
    shown = Table("process", "footprints", "traced, B a round", "traced MB", "RSS MB", "RSS by kind, MB",
                  "malloc, MB", "descriptors", "threads", title="after the warm-up → at the end", box=None)
    for name, found in judged.items():
        if not found:
            continue
        first, last = found[0], found[-1]

        def change(value: Callable[[Footprint], float], first: Footprint = first, last: Footprint = last) -> str:
            return f"{value(first):.1f} → {value(last):.1f}"

        def kinds(value: Callable[[Footprint], dict[str, int]], first: Footprint = first,
                  last: Footprint = last) -> str:
            return "\n".join(f"{kind} {value(first).get(kind, 0) / 1024:.1f} → {number / 1024:.1f}"
                             for kind, number in sorted(value(last).items()))

        shown.add_row(name, str(len(found)), f"{footprints.growth(found):,.0f}",
                      change(lambda one: one.traced / 2**20), change(lambda one: one.rss_mb),
                      kinds(lambda one: one.rss_kb), kinds(lambda one: one.malloc_kb),
                      change(lambda one: sum(one.descriptors.values())), change(lambda one: sum(one.threads.values())))
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if a bound is broken."""
    from tests.tiny import tiny_checkpoint

    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=500, help="rounds of the run [500]")
    parser.add_argument("--clients", type=int, default=20, help="clients, at least 6 [20]")
    parser.add_argument("--warm-up", type=int, default=50, help="rounds before growth counts [50]")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and footprints in this folder")
    options = parser.parse_args(argv)
    if options.clients < 6 or options.rounds < options.warm_up + 20:
        parser.error("give at least 6 clients, and 20 rounds more than --warm-up")
    console = Console() if sys.stdout.isatty() else Console(width=200)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        soak = Soak(folder, tiny_checkpoint("bert", Path(temporary) / "model"), options.rounds, options.clients,
                    real=2, every=5, warm_up=options.warm_up)
        try:
            seconds = soak.run(lambda line: console.print(line, style="dim", highlight=False))
        finally:
            soak.close()
        judged = soak.judged()
        console.print(table(judged))
        console.print(f"{rounds_in(soak.out)} rounds of {len(soak.names)} clients in {seconds:.0f} s; "
                      + ", ".join(f"{times} × {what}" for what, times in soak.done.items()), highlight=False)
        faults = [*soak.faults, *(fault for name, found in judged.items()
                                  for fault in faults_of(name, found, options.clients))]
        for fault in faults:
            console.print(fault, style="red", highlight=False, markup=False)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
