"""A campaign of attacks on a run: `python -m tests.attacks [--seconds 60] [NAME …]`, two minutes for each attack.

Each attack (`tests.attackers`) lasts for that time, against a real fedlora-server with two honest client processes. The
run is compared with one that nobody attacked. The adapter must be the same, byte by byte; if the attacker takes part as
a client, it must be of ordinary size. `python -m tests.attacks fuzz --frames 100000` sends that many randomly changed
frames to servers and to clients. With --tls the run is over mutual TLS: the attacks on its handshake
(`tests.tls_attackers`), and frames from attackers with certificates, listed ones and others. pytest does not collect
this file; `tests/test_attacks.py` runs a sample of it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from fedlora.files import open_files_allowed
from fedlora_server.checkpoint import LINES
from fedlora_server.pki.authority import Authority
from tests import fuzz, processes
from tests.attackers import ATTACKS, FUZZERS, Attack, Target, garbage_frames
from tests.identities import enrolled
from tests.kills import Started
from tests.processes import PATIENCE, Deployment, write_rows
from tests.server.tcp_proxy import TcpProxy
from tests.tls_attackers import TLS_ATTACKS

HONEST = ("north", "south")
OPTIONS = ("--min-clients", 2, "--min-replies", 2, "--seed", 5, "--rank", 2, "--local-steps", 3, "--batch-size", 20,
           "--max-length", 16)
PLENTY = 200
"""An ε so large that calibrating its noise takes no time."""
ROUND_S = 0.4
"""About the seconds of a round whose clients train record by record, on an idle machine with two cores."""
MOST_GROWTH_MB = 400
"""Largest growth of the server's memory over that in the run that nobody attacked."""
MOST_LOG_BYTES = 500_000
"""Largest size of a minute of the server's log."""
MOST_LARGER = 10.0
"""Largest ratio of an adapter's largest value to that of the run that nobody attacked."""
ENOUGH_FILES = 8192


@dataclass
class Outcome:
    """The outcome of one run.

    Attributes:
        name: the names of the attacks.
        code: the server's exit code; None if it did not end.
        adapter: the adapter's bytes; empty if there is none.
        said: the last line of the server's log.
        wrong: faults that no run may have.
        done: counts of what the attackers did.
        rounds: rounds that were finished.
        round_s: the median of their seconds, without the first one.
        seconds: how long the run took.
        most_mb: the server's largest resident memory, in MB.
        log_bytes: size of the server's log.
    """

    name: str
    code: int | None = None
    adapter: bytes = b""
    said: str = ""
    wrong: list[str] = field(default_factory=list)
    done: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    round_s: float = 0.0
    seconds: float = 0.0
    most_mb: int = 0
    log_bytes: int = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.adapter).hexdigest()[:8] if self.adapter else ""

    @property
    def largest(self) -> float:
        """The adapter's largest absolute value; NaN if a value is not finite."""
        values = [np.abs(array.astype(np.float64)).max() for array in load(self.adapter).values()]
        return float(max(values)) if np.isfinite(values).all() else float("nan")

    def verdict(self, alone: Outcome, takes_part: bool) -> str:
        """Compare with the run that nobody attacked (`alone`). The text begins with FAILED if the attack did harm."""
        growth_mb, minutes = self.most_mb - alone.most_mb, max(1.0, self.seconds / 60)
        wrong = [*self.wrong, *[f"{growth_mb} MB more than undisturbed"] * (growth_mb > MOST_GROWTH_MB),
                 *["the log is too long"] * (self.log_bytes > MOST_LOG_BYTES * minutes)]
        if self.code is None:
            wrong.append(f"it did not end ({self.rounds} rounds)")
        elif self.code == 0 and self.adapter != alone.adapter:
            if not takes_part:
                wrong.append("another adapter")
            elif not self.largest <= MOST_LARGER * alone.largest:
                wrong.append(f"the adapter's largest value is {self.largest:.3g}, undisturbed {alone.largest:.3g}")
        elif self.code != 0 and not (takes_part and self.said.startswith("fedlora-server: ")):
            wrong.append(f"exit code {self.code}: {self.said}")
        if wrong:
            return "FAILED: " + "; ".join(wrong)
        if self.code:
            return f"a clear error: {self.said}"
        return "as undisturbed" if self.adapter == alone.adapter else "ended well, with another adapter"


def server_within(files: int | None, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run fedlora-server with a limit of `files` open files."""
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, 256), files))
    processes._run("server", arguments, log, environment)


def run(folder: Path, checkpoint: Path, attacks: Sequence[Attack], options: Sequence[object], seconds: float,
        rounds: int | None = None, tls: bool = False) -> Outcome:
    """Run the server under all these attacks at once, for as many rounds as fill the time, over mutual TLS or not."""
    folder.mkdir(parents=True)
    outcome, began = Outcome(" and ".join(attack.name for attack in attacks) or "nobody attacks"), time.monotonic()
    rounds = rounds or max(3, round(seconds / ROUND_S))
    log, attacking = folder / "server.log", []
    identities = Identities(folder) if tls else None
    with Deployment(folder, checkpoint) as deployment, contextlib.ExitStack() as stack:
        if unread := not all(attack.stderr_read for attack in attacks):
            stack.enter_context(unread_pipe(log))
        server = deployment.processes["server"] = Started(
            partial(server_within, min((attack.files for attack in attacks if attack.files), default=None)), log,
            "--model", checkpoint, "--address", deployment.address, "--out", deployment.out, *OPTIONS, *options,
            "--rounds", rounds, *(("--tls", identities.authority.folder) if identities else ()),
            environment={"COLUMNS": "200", "XDG_STATE_HOME": str(deployment.home("server"))})
        wait(lambda: listening(deployment.address) or server.poll() is not None, "the server does not listen")
        target = Target(deployment, TcpProxy(deployment.address), partial(
            start_honest, deployment, threading.Lock(), "off" not in options, identities),
            identities.hostile if identities else ())
        target.start_honest = partial(target.start_honest, target.proxy.address)

        def attack(now: Sequence[Attack]) -> None:
            for one in now:
                attacking.append(threading.Thread(target=one.run, args=(target,), daemon=True))
                attacking[-1].start()

        attack([one for one in attacks if one.comes_first])
        if not any(one.comes_first for one in attacks):
            target.start_honest()
        limit = time.monotonic() + 90 + 3 * seconds
        while server.poll() is None and time.monotonic() < limit:
            outcome.most_mb = max(outcome.most_mb, memory_mb(server.pid))
            if target.until == float("inf") and rounds_done(deployment.out):
                target.until, limit = time.monotonic() + seconds, time.monotonic() + 120 + PATIENCE * seconds
                attack([one for one in attacks if not one.comes_first])
            if all(name in deployment.processes and deployment.processes[name].poll() is not None for name in HONEST):
                limit = min(limit, time.monotonic() + 10)
            time.sleep(0.1)
        outcome.code, outcome.rounds = server.poll(), rounds_done(deployment.out)
        outcome.round_s = median_seconds(deployment.out)
        for thread in attacking:
            thread.join(30.0)
        outcome.wrong += conclusions(deployment, outcome.code, unread)
        if attacks and not target.done["connections"]:
            outcome.wrong.append("the attack did nothing")
        outcome.wrong += [f"{times} {what}" for what, times in target.done.items() if what.isupper() and times]
        if not unread:
            lines = deployment.log("server").strip().splitlines()
            outcome.said, outcome.log_bytes = lines[-1] if lines else "", log.stat().st_size
        adapter = deployment.out / "adapter" / "adapter_model.safetensors"
        outcome.adapter = adapter.read_bytes() if adapter.exists() else b""
        outcome.done, outcome.seconds = dict(target.done), time.monotonic() - began
    return outcome


class Identities:
    """Certificates for the honest clients, and for attackers: listed ones, and revoked ones for the last fuzzer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "identities"
        self.authority = Authority.create(folder / "pki", ["127.0.0.1"])
        self.honest = {name: enrolled(self.authority, self._folder / name, name) for name in HONEST}
        self.hostile = [enrolled(self.authority, self._folder / name, name)
                        for name in (f"mallory-{number}" for number in range(2 * FUZZERS))]
        for revoked in self.hostile[FUZZERS - 1::FUZZERS]:
            self.authority.revoke(revoked.name)


def start_honest(deployment: Deployment, once: threading.Lock, private: bool, identities: Identities | None,
                 proxy: str) -> None:
    """Start the honest clients, unless that has been done."""
    if once.acquire(blocking=False):
        for number, name in enumerate(HONEST):
            data = write_rows(deployment.folder / "data" / name / "rows.jsonl", seed=number)
            deployment.client(name, data, "--epsilon", PLENTY if private else "inf", "--micro-batch", 1,
                              *(("--server", proxy) if name == "south" else ()),
                              *(("--tls", identities.honest[name]) if identities else ()), seed=5)


def conclusions(deployment: Deployment, code: int | None, unread: bool) -> Iterator[str]:
    """Return what went wrong with the processes."""
    for name in ("server", *HONEST):
        if name in deployment.processes and not (unread and name == "server"):
            if code is not None and name != "server":
                with contextlib.suppress(AssertionError):
                    deployment.end(name, 10.0)
            log = deployment.log(name)
            if "Traceback" in log or "ended by an error of this server" in log:
                yield f"a traceback in the log of {name}"
        if code == 0 and name != "server":
            process = deployment.processes.get(name)
            if process is None or process.poll() != 0:
                yield f"{name} ended with {process and process.poll()}"


@contextlib.contextmanager
def unread_pipe(path: Path) -> Iterator[None]:
    """Within the block, keep a named pipe of one page open that nobody reads."""
    import fcntl

    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(AttributeError, OSError):  # only Linux can make it small
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield
    finally:
        os.close(pipe)


def memory_mb(pid: int) -> int:
    """Return a process's memory; 0 if it has ended, or if the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
    except OSError:
        return 0


def rounds_done(out: Path) -> int:
    lines = out / LINES
    return sum(json.loads(line)["round"] > 0 for line in lines.read_text().splitlines()) if lines.exists() else 0


def median_seconds(out: Path) -> float:
    """Return the median of the rounds' seconds, without those of the first round; 0 if there is no other."""
    lines = out / LINES
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return float(np.median([one["seconds"] for one in found if one["round"] > 1] or [0.0]))


def listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
        return True
    return False


def wait(true: Callable[[], object], otherwise: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + PATIENCE * timeout_s
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


HEADINGS = (f"{'attack':32} {'connections':>11} {'frames':>9} {'rounds':>6} {'s each':>6} {'s':>4} {'server MB':>9} "
            f"{'log bytes':>9}  outcome")


def row(outcome: Outcome, verdict: str) -> str:
    more = ", ".join(f"{times:,} {what}" for what, times in outcome.done.items()
                     if what not in ("connections", "frames"))
    return (f"{outcome.name:32} {outcome.done.get('connections', 0):11,} {outcome.done.get('frames', 0):9,} "
            f"{outcome.rounds:6} {outcome.round_s:6.2f} {outcome.seconds:4.0f} {outcome.most_mb:9} "
            f"{outcome.log_bytes:9,}  {verdict} [{outcome.digest or 'no adapter'}]{f' ({more})' if more else ''}")


def campaign(folder: Path, checkpoint: Path, attacks: Sequence[Attack], seconds: float, rounds: int | None = None,
             tls: bool = False) -> int:
    """Run each attack by itself, print a line for each, and return how many did harm."""
    alone: dict[tuple[object, ...], Outcome] = {}
    failed = 0
    print(HEADINGS, flush=True)
    for number, attack in enumerate(attacks):
        if attack.options not in alone:
            alone[attack.options] = run(folder / f"alone {number}", checkpoint, (), attack.options, seconds, rounds,
                                        tls)
            print(row(alone[attack.options], f"({' '.join(map(str, attack.options))})"), flush=True)
            assert alone[attack.options].adapter, alone[attack.options].said
        outcome = run(folder / str(number), checkpoint, [attack], attack.options, seconds, rounds, tls)
        verdict = outcome.verdict(alone[attack.options], attack.takes_part)
        failed += verdict.startswith("FAILED")
        print(row(outcome, verdict), flush=True)
    return failed


def fuzzed(folder: Path, checkpoint: Path, frames: int, seconds: float, rounds: int | None = None,
           tls: bool = False) -> int:
    """Send `frames` changed frames to servers, in as many runs as it takes, and to clients. Return what failed."""
    attack, failed, sent, number = Attack(garbage_frames, takes_part=True), 0, 0, 0
    alone = run(folder / "alone", checkpoint, (), attack.options, seconds, rounds, tls)
    print(f"{HEADINGS}\n{row(alone, ' '.join(map(str, attack.options)))}", flush=True)
    while sent < frames:
        outcome = run(folder / str(number), checkpoint, [attack], attack.options, seconds, rounds, tls)
        verdict = outcome.verdict(alone, attack.takes_part)
        print(row(outcome, verdict), flush=True)
        failed += verdict.startswith("FAILED")
        sent, number = sent + outcome.done["frames"], number + 1
    met = fuzz.to_clients(frames, seed=0)
    wrong = [how for how in met if how.isupper() or how.startswith("CRASH")]
    print(f"{sent:,} changed frames to {number} servers; {met['frames']:,} to clients, whose connections ended so: "
          f"{dict(met)}", flush=True)
    return failed + len(wrong)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if an attack did harm."""
    from tests.tiny import tiny_checkpoint

    over_tls = [attack for attack in ATTACKS if attack.over_tls]
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks whose name holds one of these words [all]: "
                        f"{', '.join(attack.name for attack in ATTACKS)}; or fuzz alone, for changed frames both ways")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each attack [60]")
    parser.add_argument("--rounds", type=int, help="of each run [as many as fill the time where nothing else runs]")
    parser.add_argument("--frames", type=int, default=100_000, help="of fuzz, each way [100,000]")
    parser.add_argument("--tls", action="store_true", help="attack a run over mutual TLS: those of "
                        f"{', '.join(attack.name for attack in (*over_tls, *TLS_ATTACKS))}, and fuzz")
    options = parser.parse_args(argv)
    words = [name.replace("_", " ").replace("-", " ") for name in options.names]
    known = (*over_tls, *TLS_ATTACKS) if options.tls else ATTACKS
    attacks = [attack for attack in known if not words or any(word in attack.name for word in words)]
    if words != ["fuzz"] and not attacks:
        parser.error(f"no attack is called {' or '.join(words)}; they are: "
                     f"{', '.join(attack.name for attack in known)}, fuzz")
    open_files_allowed(ENOUGH_FILES)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint("bert", Path(folder) / "model")
        if words == ["fuzz"]:
            return int(fuzzed(Path(folder), checkpoint, options.frames, options.seconds, options.rounds,
                              options.tls) > 0)
        return int(campaign(Path(folder), checkpoint, attacks, options.seconds, options.rounds, options.tls) > 0)


if __name__ == "__main__":
    sys.exit(main())
