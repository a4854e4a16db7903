"""Shared parts of the ledger's tests: terms of runs, and an exact epsilon that shares no code with the ledger."""

import math
import os
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from fedlora.privacy.ledger import Ledger, LedgerError, Reservation, RunTerms

DELTA = 1e-5
SHA = "0" * 64


def terms(run_id="r1", **changes) -> RunTerms:
    """Return terms of a run whose steps read every record (q = 1), so that its epsilon is known in closed form."""
    return RunTerms(**{"run_id": run_id, "plan_sha256": "a" * 64, "unit": "row", "declared_size": 1000,
                       "sampling_rate": 1.0, "noise_multiplier": 20.0, "delta": DELTA, "clip_norm": 1.0,
                       "scales": {"adapter": 1.0}, "local_steps": 2, "max_participations": 5} | changes)


def gaussian_epsilon(trainings: list[tuple[float, int]], delta: float = DELTA) -> float:
    """Return the exact epsilon of Gaussian steps without sampling.

    Together the steps are one Gaussian mechanism with mu^2 = sum of steps / sigma^2 (Dong, Roth & Su 2022, Corollary
    3.3; Balle & Wang 2018, Theorem 8).

    Args:
        trainings: (noise multiplier, steps) of each training.
        delta: in (0, 1).
    """
    mu = math.sqrt(sum(steps / sigma**2 for sigma, steps in trainings))
    if mu == 0:
        return 0.0

    def exact_delta(epsilon: float) -> float:
        def phi(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)

    low, high = 0.0, 1.0
    while exact_delta(high) > delta:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_delta(middle) > delta else (low, middle)
    return low


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a fork of this process, which has all modules loaded, and return the fork's process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work()
        status = 0
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a forked process, and return its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def witness_of(folder: Path, dataset: str = "a") -> Path:
    return folder / f".fedlora-witness-{dataset}.json"


def opened(path: Path, epsilon: float = 8.0, dataset: str = "a", **options) -> Ledger:
    ledger = Ledger(path, **options)
    try:
        ledger.declare(dataset, epsilon=epsilon, delta=DELTA, witness=witness_of(path.parent, dataset))
    except LedgerError:
        ledger.close()
        raise
    return ledger


def train(ledger: Ledger, round: int, run_id: str = "r1", dataset: str = "a", attempt: int = 0) -> Reservation:
    reservation = ledger.reserve(dataset, run_id, round, attempt)
    reservation.begin()
    reservation.stored(SHA)
    reservation.released()
    return reservation


@contextmanager
def full_disk():
    """Let no file of this process grow, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_file_left():
    """Let this process open no further file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
