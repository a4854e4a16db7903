"""The command fedlora-simulate: whole federations on one machine, compared over strategies and seeds."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import SimulationConfig, Subcommand, listed, read_config, run_subcommand

SUBCOMMANDS = {
    "init": Subcommand("fedlora_simulations.init", "writes a TOML file with every option for --config"),
    "notes": Subcommand("fedlora_simulations.notes", "writes made-up notes to try FedLoRA on"),
    "audit": Subcommand("fedlora_simulations.audit", "measures an empirical lower bound on ε"),
    "poison": Subcommand("fedlora_simulations.poison", "measures what one hostile client costs")}

if TYPE_CHECKING:  # --help should not import these
    from rich.console import Console

    from fedlora_server.run_setup import BaseModel

    from .outcome import Simulation
    from .population import Method, Population
    from .simulated_run import Simulated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    It is 0 when done, 1 if a worker process was lost, 2 for wrong input, and 130 if interrupted.
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
        print("fedlora-simulate: interrupted; the finished rounds are in the --out folder", file=sys.stderr)
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
    epilog = ("exit codes: 0 done; 1 a worker process was lost; 2 wrong input; 130 interrupted. "
              + listed("fedlora-simulate", SUBCOMMANDS))
    options = read_config(SimulationConfig, argv, epilog=epilog, subcommands=SUBCOMMANDS)
    with quiet_clients():
        return _run(options)


def _run(options: SimulationConfig) -> int:
    from fedlora.plan import Refused

    from .worker import WorkerLost

    try:
        run(options)
        return 0
    except (ValueError, MemoryError) as error:
        print(f"fedlora-simulate: {error}", file=sys.stderr)
        return 2
    except WorkerLost as lost:
        print(f"fedlora-simulate: {lost}. The finished rounds are in the --out folder", file=sys.stderr)
        return 1
    except Refused as refused:
        reason = refused.__cause__ or refused
        print(f"fedlora-simulate: the clients refuse to take part: {reason}", file=sys.stderr)
        return 2


def run(options: SimulationConfig, console: Console | None = None, shown: Console | None = None) -> Simulation | None:
    """Run every method with every seed, and compare the methods.

    Args:
        options: the options of fedlora-simulate.
        console: shows what happens; None for stderr.
        shown: shows the table of the comparison; None for stdout.

    Returns:
        The results; None for --dry-run.

    Raises:
        ValueError: the options do not fit the model, the data or each other, or a run ended early.
        Refused: the clients' privacy limits do not allow a plan.
        WorkerLost: a worker process ended during training.
    """
    from fedlora.console import messages, results
    from fedlora.tasks import task_named
    from fedlora.training import check_computing
    from fedlora_server.folders import claimed_folder
    from fedlora_server.run_setup import (
        about_the_reduction,
        check_start,
        fewest_uploads,
        find_model,
        planned,
        prepare,
        without_effect,
    )
    from fedlora_server.settings import settings
    from fedlora_server.trackers import check_installed

    from .comparison import save, summarize, table
    from .dry_run import dry_run
    from .outcome import SimulatedRun, Simulation
    from .population import Method, check_sizes, populate
    from .simulated_run import compiles_here

    console = console or messages()
    if (options.epsilon == float("inf")) != (options.privacy == "off"):
        raise ValueError(f"--privacy {options.privacy} and --epsilon {options.epsilon:g} contradict each other; "
                         "for a run without privacy give both --privacy off and --epsilon inf")
    check_installed(options.trackers)
    base = find_model(options)
    methods = [Method.parse(text) for text in options.strategy]
    for method in methods:
        planned(method.options(options), method.strategy)
        check_start(method.options(options))
    if options.compile and options.batch_clients > 1:
        raise ValueError("--compile and --batch-clients do not work together: steps that clients share have too many "
                         "shapes to compile; leave one of the two out")
    check_computing(options.device, options.precision, compiles_here(options))
    first = populate(options, options.seeds[0])
    populations = {seed: first if seed == options.seeds[0] else first.dealt(options, seed) for seed in options.seeds}
    for seed, population in populations.items():
        check_sizes(options, methods, population, seed)
        for method in methods:
            fewest_uploads(method.options(options), method.strategy, len(population.parts))
    if options.dry_run:
        dry_run(options, methods, base, first, console)
        return None
    for method in methods[1:]:  # the first one is prepared when its run begins
        prepare(method.options(options), method.strategy, base, first.labels, options.seeds[0])
    with claimed_folder(options.out, "simulation") as out:
        for method in methods:
            own = method.options(options)
            console.print(settings(own, method.strategy, planned(own, method.strategy)))
            for told in about_the_reduction(own, method.strategy):
                console.print(told)
        for told in without_effect(options):
            console.print(told)
        if options.eval_data is None:
            console.print(f"Without --eval-data no {task_named(options.task).metric} is shown; name a file of held-out "
                          "rows to see it.")
        runs: dict[Method, list[Simulated]] = {method: [] for method in methods}
        try:
            for seed in options.seeds:
                population = populations.pop(seed)
                sizes = ", ".join(f"{name} {len(part)}" for name, part in population.parts.items())
                console.print(f"seed {seed}: {len(population.rows)} rows: {sizes}")
                for method in methods:
                    runs[method].append(_run_one(options, method, seed, base, population, out, console))
        finally:  # compare the finished runs, also if a later one fails
            comparisons = [summarize(done) for done in runs.values() if done]
            if comparisons:
                (shown or results()).print(table(comparisons))
                save(out, comparisons, {"options": vars(options)})
        console.print(f"Adapters, reports and the comparison are in {out}")
        return Simulation(out, tuple(comparisons), tuple(SimulatedRun.of(done, folder_of(out, done.method, done.seed))
                                                         for method in methods for done in runs[method]))


def _run_one(options: SimulationConfig, method: Method, seed: int, base: BaseModel, population: Population, out: Path,
             console: Console) -> Simulated:
    """Run one method with one seed, in a folder of its own below `out`."""
    from fedlora_server.advice import Advice
    from fedlora_server.run_setup import resolved
    from fedlora_server.trackers import Trackers, Watched

    from .simulated_run import simulate

    folder = folder_of(out, method, seed)
    folder.mkdir(parents=True)
    began = time.monotonic()
    try:
        chosen = resolved(method.options(options), method.strategy) | {"seed": seed}
        watched = Watched(f"{method}, seed {seed}", folder, console, chosen, together=out)
        advice = Advice(watched, lambda line: trackers.said(line))
        with Trackers(options.trackers, watched, {"advice": advice}) as trackers:
            done = simulate(options, method, seed, base, population, observer=trackers, out=folder)
        if done.result.ended == "diverged":
            raise ValueError(f"{method} ended after {done.result.rounds} of {done.federation.plan.rounds} rounds: "
                             f"{done.result.why}. The finished rounds are in {folder}")
        if done.result.ended != "finished":
            raise ValueError(f"{method} ended after {done.result.rounds} of {done.federation.plan.rounds} rounds: too "
                             "few clients could still take part. Lower --min-replies, or raise --max-participations")
    except BaseException:
        _take_away(folder)
        raise
    console.print(f"{method}, seed {seed}: {done.result.rounds} rounds in {time.monotonic() - began:.0f} s")
    return done


def folder_of(out: Path, method: Method, seed: int) -> Path:
    """Return the folder of one run below `out`."""
    return out / re.sub(r"[^\w.-]+", "-", f"{method}-seed{seed}")


def _take_away(folder: Path) -> None:
    """Remove the folder of a run without a finished round, so that the same command can be given again."""
    from fedlora_server.checkpoint import load

    try:
        finished = load(folder)[1]
    except ValueError:
        finished = 0
    if not finished:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
