"""The runs of one command, one after the other, and their comparison at the end.

Each run is a cell (`cells`). A cell that has ended is not run again; one that was interrupted goes on after its last
finished round.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fedlora.config import SimulationConfig
from fedlora.console import messages, results
from fedlora.tasks import task_named
from fedlora_server.advice import Advice
from fedlora_server.checkpoint import load
from fedlora_server.folders import UNFINISHED, check_free, claimed_folder, retaken_folder
from fedlora_server.run_setup import about_the_reduction, planned, remarks, resolved
from fedlora_server.settings import settings as settings_block
from fedlora_server.trackers import Trackers, Watched, check_installed

from . import outputs
from .campaign import Campaign, checked, key_of, prepare_all
from .cells import Cell, Cells
from .comparison import Comparison, summarize_results, table
from .continued import why_not
from .dry_run import dry_run, dry_run_of_a_sweep
from .outcome import Simulation
from .pairing import grouped
from .population import Population
from .results import Result, from_cell, kept_of, of_run
from .simulated_run import simulate
from .tune import Trials


def run(options: SimulationConfig, console: Console | None = None, shown: Console | None = None) -> Simulation | None:
    """Run every cell that the options ask for, and compare them.

    Args:
        options: the options of fedlora-simulate.
        console: shows what happens; None for stderr.
        shown: shows the table of the comparison; None for stdout.

    Returns:
        The results; None for --dry-run.

    Raises:
        ValueError: the options do not fit the model, the data or each other, or a run without a sweep ended early.
        Refused: the clients' privacy limits do not allow a plan.
        WorkerLost: a worker process ended during training.
    """
    check_installed(options.trackers)
    console, campaign = console or messages(), checked(options)
    if options.dry_run:
        _dry_run(campaign, console)
        return None
    prepare_all(campaign)
    with ExitStack() as held:
        out = _folder(options, console, held)
        return Running(campaign, out, console, shown or results()).run()


def _dry_run(campaign: Campaign, console: Console) -> None:
    options, seed = campaign.options, campaign.options.seeds[0]
    if options.out is not None and not options.resume:
        check_free(options.out)
    if not campaign.is_sweep:
        dry_run(options, campaign.methods, campaign.base(campaign.settings[0]),
                campaign.population(campaign.settings[0], seed), console)
        return
    runs = [(setting, method, campaign.base(setting), campaign.population(setting, seed))
            for setting in campaign.settings for method in campaign.methods]
    dry_run_of_a_sweep(options, runs, campaign.tuning.count if campaign.tuning else 0, console)
    if options.resume and options.out is not None and options.out.is_dir() and campaign.tuning is None:
        cells = [campaign.cell(setting, method, seed, campaign.population(setting, seed)) for setting in
                 campaign.settings for method in campaign.methods for seed in options.seeds]
        ended = len(cells) - len(Cells(options.out).left(cells))
        console.print(f"{ended} of the {len(cells)} runs have ended in {options.out} already, and would not be run "
                      "again.")


def _folder(options: SimulationConfig, console: Console, held: ExitStack) -> Path:
    """Return the command's folder, which is held until `held` closes.

    Raises:
        ValueError: it cannot be used.
    """
    out = options.out
    if out is None or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if options.resume:
            console.print(f"--resume: {out} holds nothing yet, so all runs begin now.")
        return held.enter_context(claimed_folder(out, "simulation"))
    if not options.resume:
        if out.is_dir() and len(Cells(out)):
            if not (out / UNFINISHED).exists():
                raise ValueError(f"--out {out} holds runs of an earlier command. Give --resume too to keep those that "
                                 "are finished and to go on, or name another folder")
            console.print(f"{out} holds runs of a command that was killed. They are moved aside; to go on with them, "
                          "give --resume.")
        return held.enter_context(claimed_folder(out, "simulation"))
    if not out.is_dir() or not len(Cells(out)):
        raise ValueError(f"--resume: --out {out} holds no run of fedlora-simulate; name the folder of the command that "
                         "is to go on")
    try:
        return held.enter_context(retaken_folder(out))
    except OSError as error:
        raise ValueError(f"--out {out} cannot be used: {error.strerror}; name another folder") from None


class Running:
    """A campaign under way.

    Args:
        campaign: what to run.
        out: the folder.
        console: shows what happens.
        shown: shows the table of the comparison.
    """

    def __init__(self, campaign: Campaign, out: Path, console: Console, shown: Console) -> None:
        self._campaign, self._out, self._console, self._shown = campaign, out, console, shown
        self._cells, self._results, self._number = Cells(out), list[Result](), 0
        self._notes: tuple[str, ...] = ()

    def run(self) -> Simulation:
        """Run all cells and return their results."""
        campaign, options = self._campaign, self._campaign.options
        self._introduce()
        try:
            chosen = self._tuned()
            for seed in options.seeds:
                populations: dict[str, Population] = {}
                for setting in campaign.settings:
                    key = key_of(setting.options)
                    population = populations.get(key)
                    if population is None:
                        population = populations[key] = campaign.population(setting, seed)
                        sizes = ", ".join(f"{name} {len(part)}" for name, part in population.parts.items())
                        self._console.print(f"seed {seed}: {len(population.rows)} rows: {sizes}")
                    for method in campaign.methods:
                        cell = campaign.cell(setting, method, seed, population, chosen.get((str(setting), str(method))))
                        self._number += 1
                        self._results.append(self._result(cell, population))
        finally:  # compare the finished runs, also if a later one fails
            if self._results:
                self._compare()
        self._console.print(f"Adapters, reports and the comparison are in {self._out}")
        done = Simulation(self._out, tuple(self._comparisons()), tuple(self._results))
        if done.failed:
            self._console.print(f"{len(done.failed)} of {len(self._results)} runs ended early: " + ", ".join(
                f"{Path(one.folder).name} ({one.status})" for one in done.failed))
        return done

    def _introduce(self) -> None:
        """Print the settings of each method, and what has no effect."""
        campaign, first = self._campaign, self._campaign.settings[0].options
        if campaign.is_sweep:
            self._console.print(f"{campaign.runs} runs: {len(campaign.settings)} setting"
                                f"{'s' * (len(campaign.settings) != 1)}, {len(campaign.methods)} method"
                                f"{'s' * (len(campaign.methods) != 1)}, {len(first.seeds)} seed"
                                f"{'s' * (len(first.seeds) != 1)}"
                                + (f"; below, {campaign.settings[0]}" if campaign.settings[0].values else ""))
        for method in campaign.methods:
            own = method.options(first)
            self._console.print(settings_block(own, method.strategy, planned(own, method.strategy)))
            for told in about_the_reduction(own, method.strategy):
                self._console.print(told)
        for told in dict.fromkeys(f"{setting.before}{told}" for setting in campaign.settings
                                  for told in remarks(setting.options)):
            self._console.print(told)
        if first.eval_data is None:
            self._console.print(f"Without --eval-data no {task_named(first.task).metric} is shown; name a file of "
                                "held-out rows to see it.")

    def _tuned(self) -> dict[tuple[str, str], Trials]:
        """Run the trials of --tune, and return for each setting and method what they chose."""
        campaign, tuning = self._campaign, self._campaign.tuning
        if tuning is None:
            return {}
        self._console.print(f"{tuning.told()}.")
        seed, chosen = campaign.options.seeds[0], {}
        for setting in campaign.settings:
            population = tuning.population(setting.options, campaign.population(setting, seed), seed)
            for method in campaign.methods:
                trials = Trials(setting, method)
                for values, options in tuning.trials(setting.options):
                    cell = Cell.of(options, method, seed, campaign.base(setting), population,
                                   values={**setting.values, **values})
                    trials.add(values, tuning.final(setting.options, values), self._result(cell, population,
                                                                                          tuning=True))
                self._console.print(trials.told())
                chosen[str(setting), str(method)] = trials
        tuning.write(self._out, chosen.values())
        self._notes = (tuning.told(),)
        return chosen

    def _result(self, cell: Cell, population: Population, *, tuning: bool = False) -> Result:
        """Return the cell's result: that of an earlier command if there is one, else that of a run now.

        Args:
            cell: the cell.
            population: its clients and their rows.
            tuning: whether it is one of --tune.

        Raises:
            ValueError: it ended early, and there is no sweep.
        """
        kept = self._cells.kept(cell)
        which = f"{'tuning, ' if tuning else ''}{cell}"
        if kept is not None and kept.ended:
            self._console.print(f"{which}: kept from before ({kept.folder.name})")
            return self._settled(from_cell(kept), cell, tuning)
        why = why_not(kept.folder, kept.about["computed"], cell.computed) if kept is not None else ""
        if kept is not None and not why:
            folder, go_on = kept.folder, True
            self._console.print(f"{which}: goes on after its last finished round")
        else:
            if why:
                self._console.print(f"{which}: is run anew, because {why}")
            folder, go_on = self._cells.begin(cell, tuning=tuning), False
        done = self._run(cell, population, folder, tuning=tuning, go_on=go_on)
        try:
            return self._settled(done, cell, tuning)
        except ValueError:
            self._take_away(cell, folder)
            raise

    def _settled(self, result: Result, cell: Cell, tuning: bool) -> Result:
        """Return the result; raise ValueError if it ended early and there is nothing else to be compared."""
        if result.status == "finished" or self._campaign.is_sweep or tuning:
            return replace(result, swept=cell.values, tuned=cell.tuned)
        rounds = planned(cell.method.options(cell.options), cell.method.strategy).rounds
        if result.status == "diverged":
            raise ValueError(f"{cell.method} ended after {result.last_round} of {rounds} rounds: {result.why}. The "
                             f"finished rounds are in {result.folder}")
        raise ValueError(f"{cell.method} ended after {result.last_round} of {rounds} rounds: too few clients could "
                         "still take part" + (f" ({result.why})" if result.why else "")
                         + ". Lower --min-replies, or raise --max-participations")

    def _run(self, cell: Cell, population: Population, folder: Path, *, tuning: bool, go_on: bool) -> Result:
        """Run one cell in its folder, and keep what it measured there."""
        began, options, method = time.monotonic(), cell.options, cell.method
        console = self._console
        try:
            chosen = resolved(method.options(options), method.strategy) | {"seed": cell.seed}
            watched = Watched(str(cell), folder, console, chosen, together=self._out)
            advice = Advice(watched, lambda line: trackers.said(line))
            watching = ((), {}) if tuning else (options.trackers, {"advice": advice})
            with Trackers(watching[0], watched, watching[1]) as trackers:
                base = self._campaign.bases[options.model]
                done = simulate(options, method, cell.seed, base, population, observer=trackers, out=folder,
                                go_on=go_on)
        except BaseException:
            self._take_away(cell, folder)
            raise
        self._cells.write(cell, folder, done.result.ended, kept_of(of_run(done)))
        kept = self._cells.kept(cell)
        assert kept is not None, "it was just written"
        of = f" ({self._number} of {self._campaign.runs})" if self._campaign.is_sweep and not tuning else ""
        ended = "" if done.result.ended == "finished" else f", {done.result.ended}: {done.result.why}".rstrip(": ")
        console.print(f"{'tuning, ' if tuning else ''}{cell}: {done.result.rounds} rounds in "
                      f"{time.monotonic() - began:.0f} s{ended}{of}")
        return from_cell(kept)

    def _take_away(self, cell: Cell, folder: Path) -> None:
        """Remove the folder of a run without a finished round, so that the same command can be given again."""
        try:
            finished = load(folder).round
        except ValueError:
            finished = 0
        if not finished:
            shutil.rmtree(folder)
            self._cells.forget(cell)
            if folder.parent != self._out and not any(folder.parent.iterdir()):
                folder.parent.rmdir()

    def _comparisons(self) -> list[Comparison]:
        return [summarize_results(group.ended or group.results, group.settings) for group in grouped(self._results)]

    def _compare(self) -> None:
        """Print the comparison of all results so far, and write its files."""
        campaign, options = self._campaign, self._campaign.options
        if campaign.is_sweep:
            outputs.show(self._results, self._shown, published=campaign.published)
        else:
            self._shown.print(table(self._comparisons()))
        said = outputs.write(self._out, self._results, heading=f"Simulation {self._out.name}",
                             published=campaign.published, notes=self._notes, about={"options": vars(options)})
        if said:
            self._console.print(said)
