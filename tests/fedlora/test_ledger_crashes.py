"""Tests of crashes: a process killed anywhere has recorded at least what it spent, and the next one continues."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

import fedlora.privacy.ledger
from fedlora.privacy.ledger import Ledger, LedgerError
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, filter_epsilon
from fedlora.privacy.ledger.witness import read_witness

from .ledgers import DELTA, ended, forked, gaussian_epsilon, terms, witness_of

SHA = "0" * 64
STRIDE = 6
"""Distance in executed lines from one kill to the next. With 1, each of about 900 lines is once the last one."""

SIGMA, STEPS, MOST = 50.0, 1, 400
RUN = terms(noise_multiplier=SIGMA, local_steps=STEPS, max_participations=MOST)


def opened(folder: Path) -> Ledger:
    ledger = Ledger(folder / "ledger")
    ledger.declare("a", epsilon=20.0, delta=DELTA, witness=witness_of(folder))
    return ledger


@pytest.fixture
def folder(tmp_path):
    """Provide a folder, in memory if possible: what a process wrote survives its kill, synchronised or not."""
    where = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(dir=where if os.access(where, os.W_OK) else tmp_path))
    yield made
    shutil.rmtree(made)


@pytest.fixture(autouse=True)
def opacus_is_loaded():
    """Import Opacus in this process, so that its forks need not."""
    assert filter_epsilon([RUN.spends(MOST)], DELTA, FILTER_ORDERS) < 20.0


class Told:
    """A worker's account of what it is about to do, sent through a pipe. Bytes in a pipe survive the writer's death."""

    def __init__(self):
        self.read_end, self.write_end = os.pipe()
        self._rest = b""
        self.lines = []

    def tell(self, what: str, round: int) -> None:
        os.write(self.write_end, f"{what} {round}\n".encode())

    def listen(self, blocking: bool = True) -> int:
        """Read the lines that have come, at least one, and return how many there are in all."""
        os.set_blocking(self.read_end, blocking)
        with suppress(BlockingIOError):
            self._rest += os.read(self.read_end, 1 << 20)
        *lines, self._rest = self._rest.split(b"\n")
        self.lines += [(what.decode(), int(round)) for what, round in map(bytes.split, lines)]
        return len(self.lines)

    def rounds(self, what: str) -> set[int]:
        return {round for said, round in self.lines if said == what}


def work(folder: Path, told: Told, seed: int, trainings: int) -> None:
    """Work as a client does: first send updates that were stored and not sent, then train new rounds."""
    choice = random.Random(seed)
    ledger = opened(folder)
    ledger.begin_run("a", RUN)
    for charge in ledger.charges("a"):
        if charge.state == "stored":
            ledger.released_again("a", "r1", charge.round, 0, charge.sha256)
            told.tell("sent", charge.round)
    last = max((charge.round for charge in ledger.charges("a")), default=0)
    for round in range(last + 1, last + 1 + trainings):
        reservation = ledger.reserve("a", "r1", round, 0)
        if choice.random() < 0.2:
            reservation.void()
            continue
        reservation.begin()
        told.tell("read", round)
        reservation.stored(SHA)
        reservation.released()
        told.tell("sent", round)
    ledger.close()


def check(folder: Path, told: Told) -> str:
    """Check that the ledger has recorded all that the worker told. Return the state of the last charge."""
    witness = read_witness(witness_of(folder))  # read before opening the ledger, which could change it
    ledger = opened(folder)
    by_round = {charge.round: charge for charge in ledger.charges("a")}
    for round in told.rounds("read"):
        assert by_round[round].state in ("reserved", "stored", "released")
    for round in told.rounds("sent"):
        assert by_round[round].state == "released"
        assert witness is not None and witness.rows > by_round[round].sequence
    truth = gaussian_epsilon([(SIGMA, STEPS)] * len(told.rounds("read")))
    assert truth <= ledger.lifetime("a").spent <= 20.0
    assert truth <= ledger.epsilon("a", "r1")
    ledger.close()
    return max(by_round.values(), key=lambda charge: charge.sequence).state if by_round else "none"


def test_200_kills_at_random_moments_never_lose_a_charge(folder):
    """On each of 10 ledgers, 20 processes work one after the other. Each is killed by SIGKILL in the middle."""
    choice, left, kills = random.Random(7), Counter(), 0
    for i in range(10):
        place, told = folder / str(i), Told()
        for j in range(20):
            heard = told.listen(blocking=False)
            pid = forked(lambda place=place, told=told, seed=100 * i + j: work(place, told, seed, 1000))
            while told.listen() < heard + choice.randrange(1, 6):
                pass
            time.sleep(choice.uniform(0, 0.003))
            os.kill(pid, signal.SIGKILL)
            kills += ended(pid) == -signal.SIGKILL
            told.listen(blocking=False)
            left[check(place, told)] += 1
        assert len(told.rounds("sent")) > 20
    assert kills == 200
    assert {"reserved", "stored", "released"} <= set(left), left


def test_a_kill_at_any_line_of_the_ledger_never_loses_a_charge(folder):
    """Kill a process after its n-th executed line, for every `STRIDE`-th n from the opening to the second update."""
    source = str(Path(fedlora.privacy.ledger.__file__).parent)
    start = folder / "start"
    work(start, Told(), 2, 1)
    left, n = Counter(), 1
    while True:
        place, told = folder / str(n), Told()
        shutil.copytree(start, place)

        def die_at(n=n, place=place, told=told):
            executed = 0

            def trace(frame, event, arg):
                nonlocal executed
                if not frame.f_code.co_filename.startswith(source):
                    return None
                executed += event == "line"
                if executed == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            work(place, told, 1, 2)

        status = ended(forked(die_at))
        told.tell("end", 0)
        told.listen()
        told.lines += [("read", 1), ("sent", 1)]
        left[check(place, told)] += 1
        os.close(told.read_end)
        os.close(told.write_end)
        shutil.rmtree(place)
        if status != -signal.SIGKILL:
            break
        n += STRIDE
    assert status == 0 and n > 200
    assert {"reserved", "stored", "released"} <= set(left), left


def test_a_restart_in_the_middle_of_a_training_costs_exactly_one_participation(tmp_path):
    told = Told()

    def die_while_training():
        ledger = opened(tmp_path)
        ledger.begin_run("a", RUN)
        ledger.reserve("a", "r1", 1, 0).begin()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(forked(die_while_training)) == -signal.SIGKILL
    work(tmp_path, told, 1, 0)
    ledger = opened(tmp_path)
    assert [charge.state for charge in ledger.charges()] == ["reserved"]
    ledger.begin_run("a", RUN)
    with pytest.raises(LedgerError, match="charged before"):
        ledger.reserve("a", "r1", 1, 0)
    assert ledger.history("a", "r1") == RUN.spends(1)


LIGHT = """
import math, os, sys
from pathlib import Path
from fedlora.privacy.ledger import Ledger, RunTerms
assert "torch" not in sys.modules and "opacus" not in sys.modules
folder = Path(sys.argv[1])
ledger = Ledger(folder / "ledger")
ledger.declare("a", epsilon=math.inf, delta=1e-5, witness=folder / "witness")
ledger.begin_run("a", RunTerms("r1", "p", "row", 9, 1.0, 1.0, 1e-5, 1.0, {}, 1, 9))
null = os.open("/dev/null", os.O_WRONLY)
for round in (1, 2):
    os.write(null, b"RESERVE")
    reservation = ledger.reserve("a", "r1", round, 0)
    reservation.begin()
    os.write(null, b"READ THE FIRST RECORD")
    reservation.stored("0" * 64)
    os.write(null, b"RELEASE")
    reservation.released()
    os.write(null, b"SEND THE UPDATE")
"""


def test_charge_and_witness_are_synchronised_to_the_disk_before_the_reading_and_the_sending(tmp_path):
    """Check the order of a real process' system calls, as strace records them."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "log"
    traced = "trace=write,pwrite64,fsync,fdatasync,rename,renameat"
    done = subprocess.run(["strace", "-f", "-y", "-o", log, "-e", traced,
                           sys.executable, "-c", LIGHT, tmp_path], capture_output=True, text=True)
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr
    calls = re.findall(r"^\d+ +(\w+)\((.*)", log.read_text(), re.MULTILINE)
    moments = [(i, text) for i, (name, text) in enumerate(calls) if name == "write" and "/dev/null" in text]
    assert len(moments) == 2 * 4
    for (begin, said), (end, then) in pairwise(moments):
        between = [(name, "wal" if "ledger-wal>" in text else "witness" if "/witness" in text else
                    "folder" if f"<{tmp_path}>" in text else "other") for name, text in calls[begin + 1:end]]
        if "RESERVE" in said:
            assert "READ" in then
            assert ("pwrite64", "wal") in between and between[-1] == ("fdatasync", "wal")
        if "RELEASE" in said:
            assert "SEND" in then
            order = [("write", "witness"), ("fsync", "witness"), ("rename", "witness"), ("fsync", "folder"),
                     ("pwrite64", "wal"), ("fdatasync", "wal")]
            assert [call for i, call in enumerate(between) if call not in between[:i]] == order
            assert between[-1] == ("fdatasync", "wal")
