"""The command fedlora-simulate: whole federations on one machine, compared over strategies and seeds."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedlora.config import SimulationConfig, Subcommand, listed, read_config, run_subcommand

SUBCOMMANDS = {
    "init": Subcommand("fedlora_simulations.init", "writes a TOML file with every option for --config"),
    "notes": Subcommand("fedlora_simulations.notes", "writes made-up notes to try FedLoRA on"),
    "compare": Subcommand("fedlora_simulations.compare", "compares the runs of several commands"),
    "audit": Subcommand("fedlora_simulations.audit", "measures an empirical lower bound on ε"),
    "poison": Subcommand("fedlora_simulations.poison", "measures what one hostile client costs"),
    "rank-starts": Subcommand("fedlora_simulations.rank_starts", "ranks the starts of a strategy on public rows")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    It is 0 when done, 1 if a worker process was lost or a run of a sweep ended early, 2 for wrong input, and 130 if
    interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    set_environment()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if argv[:1] == ["bench"]:
            print(_bench_moved(argv[1:]), file=sys.stderr)
            return 2
        if (ended := run_subcommand(argv, "fedlora-simulate", SUBCOMMANDS)) is not None:
            return ended
        return _simulated(argv)
    except KeyboardInterrupt:
        print("fedlora-simulate: interrupted; the finished rounds are in the --out folder, and --resume goes "
              "on with them", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"fedlora-simulate: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        return 2


def set_environment() -> None:
    """Turn off telemetry. Call this before Flower and the Hugging Face libraries are imported, which read it then."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", HF_HUB_DISABLE_TELEMETRY="1")


@contextmanager
def quiet_clients() -> Iterator[None]:
    """Within the block, log no errors of clients: they are raised as well, and told once."""
    clients = logging.getLogger("fedlora_client")
    level = clients.level
    clients.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        clients.setLevel(level)


def _bench_moved(argv: Sequence[str]) -> str:
    """Return a message that names the command which replaces `fedlora-simulate bench`."""
    return ("fedlora-simulate bench is now a command of its own, in a checkout of FedLoRA's repository. From its root "
            f"run:  {shlex.join(['python', '-m', 'benchmarks', *argv])}")


def _simulated(argv: Sequence[str]) -> int:
    epilog = ("exit codes: 0 done; 1 a worker process was lost, or a run of a sweep ended early; 2 wrong input; 130 "
              "interrupted. " + listed("fedlora-simulate", SUBCOMMANDS))
    options = read_config(SimulationConfig, argv, epilog=epilog, subcommands=SUBCOMMANDS)
    with quiet_clients():
        return _run(options)


def _run(options: SimulationConfig) -> int:
    from fedlora.plan import Refused

    from .running import run
    from .worker import WorkerLost

    try:
        done = run(options)
        return int(done is not None and bool(done.failed))
    except (ValueError, MemoryError) as error:
        print(f"fedlora-simulate: {error}", file=sys.stderr)
        return 2
    except WorkerLost as lost:
        print(f"fedlora-simulate: {lost}. The finished rounds are in the --out folder, and --resume goes on with "
              "them", file=sys.stderr)
        return 1
    except Refused as refused:
        reason = refused.__cause__ or refused
        print(f"fedlora-simulate: the clients refuse to take part: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
