"""The command fedlora-simulate poison: what one hostile client costs the federation.

In runs without privacy, one client trains as the others do and sends something else (`KINDS`). Two runs with the same
seed differ in nothing but what follows from that. So the cost is the difference from the run in which the same client
sends what it trained. The attacker stands between a session and the engine: no option turns an installed client into
one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

from fedlora.config import Parser, SimulationConfig, build_parser, option, read_config, values
from fedlora.config.option import RUN
from fedlora.console import messages, results
from fedlora.figures import headline
from fedlora.plan import Refusal, Released, RoundPlan, Tensors, Upload
from fedlora_client.flower_app import Session
from fedlora_server.folders import claimed_folder
from fedlora_server.observer import jsonable
from fedlora_server.run_setup import BaseModel, find_model

from .comparison import mean_and_deviation
from .population import Method, Population, populate
from .simulated_run import simulate

HONEST = "honest"
"""The kind of upload that the others are compared with: the client sends what it trained."""

RESULT = "poison.json"
"""File name of the results."""

FIXED = ("privacy", "epsilon", "workers", "batch_clients", "engine", "ray_address", "dry_run", "sweep", "resume",
         "reference", "tune", "tune_budget", "secure_aggregation", "trust")
"""Options of a simulation that this command sets itself."""

Sent = Callable[[Tensors, Tensors, Sequence[Tensors]], Tensors]
"""Maps the trained tensors, the received ones, and those trained in earlier rounds to the tensors that are sent."""


def _times(factor: float) -> Sent:
    return lambda trained, received, earlier: {
        name: (received[name] + factor * (array - received[name])).astype(np.float32)
        for name, array in trained.items()}


KINDS: Mapping[str, Sent] = {
    "nan": lambda trained, received, earlier: {name: np.full_like(array, np.nan) for name, array in trained.items()},
    "million-times": _times(1e6),
    "minus-ten-times": _times(-10.0),
    "first-round": lambda trained, received, earlier: (*earlier, trained)[0],
    "other-shape": lambda trained, received, earlier: {
        name: np.concatenate([array, array]) for name, array in trained.items()},
}
"""Kinds of upload that the hostile client can send in each round, by name."""


@dataclass(frozen=True, kw_only=True)
class PoisonConfig(SimulationConfig):
    """Let one client send what it did not train, and measure what that costs the adapter.

    The options are those of a simulation. All runs are without privacy.
    """

    forms: ClassVar[tuple[str, ...]] = ("fedlora-simulate poison --data DIR_OR_FILE --eval-data FILE [options]",)
    fixed: ClassVar[tuple[str, ...]] = FIXED

    clients: int | None = option(None, "clients", RUN, values.count, unset="5; with --partition files one for each",
                                 place=1)
    rounds: int | None = option(10, "rounds", RUN, values.count, place=1)
    sends: tuple[str, ...] = option(
        tuple(KINDS), "what the hostile client sends, with one run for each: its update times a factor, what it "
        "trained in the first round, …", RUN, values.several(tuple(KINDS), "kind of upload"), metavar="KIND,…", place=1)
    json: bool = option(False, "print JSON instead of a table", RUN, None)


class Hostile:
    """A session with an attacker between it and the engine.

    Args:
        session: the client's session, which trains as usual.
        sent: makes what is sent from what was trained.
    """

    def __init__(self, session: Session, sent: Sent) -> None:
        self._session, self._sent = session, sent
        self._earlier: list[Tensors] = []

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Let the client train, and return an upload with other tensors; a refusal is returned as it is."""
        answer = self._session.run_round(plan, tensors)
        if isinstance(answer, Refusal):
            return answer
        sent = self._sent(answer.tensors, tensors, self._earlier)
        self._earlier.append(answer.tensors)
        return replace(answer, tensors=Released(sent))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    Attributes:
        figures: the task's figures on the held-out rows, for the last state that was accepted and evaluated.
        left_out: number of rounds in which the hostile client's upload was left out.
        honest_left_out: number of uploads of the other clients that were left out, over all rounds.
        ended: how the run ended, as in `FederationResult`.
        rounds: number of finished rounds.
        seconds: how long the run took.
    """

    figures: Mapping[str, float]
    left_out: int
    honest_left_out: int
    ended: str
    rounds: int
    seconds: float


def run_one(options: SimulationConfig, seed: int, base: BaseModel, population: Population,
            sent: Sent | None) -> Outcome:
    """Run one federation whose first client sends what `sent` makes; with None it sends what it trained."""
    hostile = min(population.parts)
    done = simulate(options, Method.parse(options.strategy[0]), seed, base, population, between=lambda name, session: (
        Hostile(session, sent) if sent is not None and name == hostile else session))
    records = [record for record in done.result.records if record.round]
    unused = [name for record in records for name in {**record.rejected, **record.refused}]
    evaluated = [record.evaluation for record in done.result.records if record.evaluation]
    return Outcome(dict(evaluated[-1]), unused.count(hostile), len(unused) - unused.count(hostile),
                   done.result.ended, done.result.rounds, done.seconds)


def table(outcomes: Mapping[str, Mapping[int, Outcome]]) -> Table:
    """Return a table with one row for each kind: its figures, and their change from the honest runs, seed by seed."""
    honest = outcomes[HONEST]
    metric = next(iter(headline(next(iter(honest.values())).figures)))
    shown = Table(box=None, pad_edge=False, title_justify="left", title=(
        f"one client sends what it did not train; {len(honest)} paired seeds, mean ± deviation"))
    for name in ("sends", metric, "change", "loss", "left out", "honest left out", "ended"):
        words = name in ("sends", "ended")  # those may break, so that the figures fit 80 columns
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words and " " not in name,
                         overflow="fold")
    for kind, runs in outcomes.items():
        cells = ["{:.3f} ± {:.3f}".format(*mean_and_deviation([one.figures[figure] for one in runs.values()]))
                 for figure in (metric, "loss")]
        change = mean_and_deviation([one.figures[metric] - honest[seed].figures[metric] for seed, one in runs.items()])
        cells.insert(1, "" if kind == HONEST else "{:+.3f} ± {:.3f}".format(*change))
        rounds = sum(one.rounds for one in runs.values())
        shown.add_row(kind, *cells, f"{sum(one.left_out for one in runs.values())} of {rounds}",
                      f"{sum(one.honest_left_out for one in runs.values())}",
                      ", ".join(sorted({one.ended for one in runs.values()})))
    return shown


def parser() -> Parser:
    """Return the command's parser."""
    return build_parser(PoisonConfig)


def read_poison_config(argv: Sequence[str]) -> PoisonConfig:
    """Read the options; exit with code 2 if one is wrong."""
    options, plain, parser = read_config(PoisonConfig, argv), PoisonConfig(), build_parser(PoisonConfig)
    for key in FIXED:
        if getattr(options, key) != getattr(plain, key):
            parser.error(f"--{key.replace('_', '-')} cannot be set here: all clients train without privacy, in this "
                         "process; leave it out")
    if options.data is None or options.eval_data is None:
        parser.error(f"--{'eval-data' if options.data else 'data'} is missing: name "
                     f"{'a file of held-out rows' if options.data else 'a folder or file of training rows'}")
    if len(options.strategy) > 1:
        parser.error(f"--strategy names {len(options.strategy)} strategies; name one at a time")
    return replace(options, privacy="off", epsilon=math.inf,
                   clients=options.clients or (None if options.partition == "files" else 5))


def run_all(options: PoisonConfig, out: Path, console: Console) -> dict[str, dict[int, Outcome]]:
    """Run every kind with every seed; write the outcomes to `RESULT` in the folder after each run.

    Returns:
        Kind → seed → outcome.
    """
    outcomes: dict[str, dict[int, Outcome]] = {kind: {} for kind in (HONEST, *options.sends)}
    base, first = find_model(options), populate(options, options.seeds[0])
    for seed in options.seeds:
        population = first.dealt(options, seed)
        for kind, runs in outcomes.items():
            runs[seed] = one = run_one(options, seed, base, population, KINDS.get(kind))
            console.print(f"seed {seed}, {kind}: {one.ended} after {one.rounds} rounds and {one.seconds:.0f} s")
            result = {"options": jsonable(vars(options)), "outcomes": {
                kind: {seed: asdict(one) for seed, one in runs.items()} for kind, runs in outcomes.items()}}
            (out / RESULT).write_text(json.dumps(jsonable(result), indent=1))
    return outcomes


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 when done, 2 for wrong input."""
    options, console = read_poison_config(argv), messages()
    try:
        with claimed_folder(options.out, "poison") as out:
            outcomes = run_all(options, out, console)
    except (ValueError, MemoryError) as error:
        print(f"fedlora-simulate poison: {error}", file=sys.stderr)
        return 2
    if options.json:
        print((out / RESULT).read_text())
    else:
        results().print(table(outcomes))
    console.print(f"{RESULT} is in {out}")
    return 0
