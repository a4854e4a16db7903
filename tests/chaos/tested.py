"""A process under test: the command, in its namespaces, which waits at named moments for what is to happen to it.

At such a moment the process writes a mark and waits until it may go on. So the campaign cuts, kills or fills at exactly
that point, however slow the machine is, and knows that it was reached.

The randomness of a client is derived from its name and the round, so that its update has the same bits in every run,
also if it trains a second time. The ledger is a real one nevertheless: nothing in the client knows.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import processes
from tests.chaos import clocks, namespaces
from tests.chaos.keepers import Guarded
from tests.kills import AFTER, BEFORE, POINTS, SERVER_POINTS, act_at, charges_seen, tell_of_uploads

OTHER_POINTS: Mapping[str, tuple[str, str]] = {
    "before it joins": ("fedlora_client.connection:Connection.join", BEFORE),
    "before it is ready": ("fedlora_client.connection:Connection.ready", BEFORE),
    "before the charge": ("fedlora.privacy.ledger.ledger:Ledger.reserve", BEFORE),
    "once the run has ended": ("fedlora_client.participation:Participation.conclude", BEFORE),
    "once it has read its certificate": ("fedlora_client.tls:Tls.identity", AFTER),
    "before the aggregation": ("fedlora_strategies.base:FederatedLoRA.aggregate_train", BEFORE),
    "after the aggregation": ("fedlora_strategies.base:FederatedLoRA.aggregate_train", AFTER),
    "before it reads its certificate again": ("fedlora_server.tls:ServerTls._renewed", BEFORE),
    "before it reads the list of clients": ("fedlora_server.tls:ServerTls.why_refused", BEFORE),
    "once a certificate is issued": ("fedlora_server.pki.authority:replace_file", AFTER),
    "before it says goodbye": ("fedlora_server.grpc_session:GrpcSession.goodbye", BEFORE),
}
"""Further points, as in `tests.kills.POINTS`, but counted from the start of the process."""

MARK_EVERY_S = 0.005


@dataclass(frozen=True)
class Hold:
    """A moment at which a process waits.

    Attributes:
        point: a point of `tests.kills` or of `OTHER_POINTS`.
        times: which passing of the point it is, from 1. A client's points of `tests.kills` count from its first charge.
        mark: file that says that the moment has come. MARK.go lets the process go on; MARK.seen then holds its time.
    """

    point: str
    times: int
    mark: Path

    @property
    def go(self) -> Path:
        return self.mark.with_suffix(".go")

    @property
    def seen(self) -> Path:
        return self.mark.with_suffix(".seen")


@dataclass(frozen=True)
class Life:
    """All that a process is started with.

    Attributes:
        command: "server" or "client".
        arguments: the command's arguments.
        log: file for its stdout and stderr.
        environment: its further variables.
        holds: the moments at which it waits, in order.
        told: file for what a client trains, or what a server receives.
        network: file of its network namespace; "" for the machine's.
        mounts: file of its mount namespace; "" for the machine's.
        clock: file of its clock; None for the machine's.
    """

    command: str
    arguments: tuple[str, ...]
    log: Path
    environment: Mapping[str, str]
    holds: tuple[Hold, ...]
    told: Path
    network: str = ""
    mounts: str = ""
    clock: Path | None = None


def start(life: Life) -> processes.Process:
    """Start a process. One with a clock of its own is a new one, since libfaketime cannot come later."""
    if life.clock is None:
        life.log.write_bytes(b"")
        return Guarded(live, life)
    order = life.log.with_suffix(".order")
    order.write_bytes(pickle.dumps(life))
    with life.log.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", __name__, str(order)], stdout=log, stderr=log,
                                env=os.environ | clocks.environment(life.clock))


def live(life: Life) -> None:
    """Be the process: enter its namespaces, set its moments, and run the command."""
    here = os.getcwd()
    for namespace in (life.network, life.mounts):
        if namespace:
            namespaces.enter(namespace)
    os.chdir(here)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if life.command == "client":
        _derive_randomness()
        _tell_of_trainings(life.told)
    else:
        tell_of_uploads(life.told)
    _wait_at(life.holds)
    processes._run(life.command, life.arguments, life.log, life.environment)


def place_of(point: str) -> tuple[str, str]:
    """Return a point's function, and when in its call the moment is."""
    return (POINTS | SERVER_POINTS | OTHER_POINTS)[point]  # type: ignore[operator]


def _wait_at(holds: Sequence[Hold]) -> None:
    charged = charges_seen() if any(hold.point in POINTS for hold in holds) else lambda: True
    passed: list[Hold] = []

    def install(number: int, hold: Hold) -> None:
        def counts() -> bool:
            return len(passed) >= number and (hold.point not in POINTS or charged())

        def wait() -> None:
            passed.append(hold)
            hold.mark.write_bytes(b"")
            while not hold.go.exists():
                time.sleep(MARK_EVERY_S)
            hold.seen.write_text(str(time.time()))

        act_at(*place_of(hold.point), hold.times, counts, wait)

    for number, hold in enumerate(holds):
        install(number, hold)


def _derive_randomness() -> None:
    from fedlora.privacy.rng import RandomStream, RunStreams

    def stream(self: RunStreams, round: int, purpose: str, attempt: int = 0) -> RandomStream:
        return RandomStream.derived(5, self.name, round, purpose)

    RunStreams.stream = stream  # type: ignore[method-assign]


def _tell_of_trainings(told: Path) -> None:
    """Have this process write a line for each training that it begins."""
    from fedlora.training.trainer import Trainer

    train: Callable[..., Any] = Trainer.train

    def telling(self: Trainer, job: Any, *arguments: Any, **named: Any) -> Any:
        with told.open("a") as lines:
            lines.write(f"{job.round} {job.attempt}\n")
        return train(self, job, *arguments, **named)

    Trainer.train = telling  # type: ignore[method-assign]


def main(order: str) -> None:
    """Be the process that `start` began."""
    clocks.settle()
    import tests.warm  # noqa: F401  as in the process that the others are forked from

    live(pickle.loads(Path(order).read_bytes()))


if __name__ == "__main__":
    main(sys.argv[1])
