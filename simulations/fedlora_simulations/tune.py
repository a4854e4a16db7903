"""Tuning: the choice of options' values on a split of its own, before the runs that are reported.

A fifth of the training rows is held out; --eval-data plays no part. Each candidate trains once on the other rows, with
the first seed, at the ε of its setting, and is judged by the task's figure on the rows held out. The chosen values are
then used for all seeds, on all training rows. So the reported figures are of rows that no choice has seen.

The choice itself depends on private rows, and no ε contains what it tells about them. Every output says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.config import SimulationConfig
from fedlora.figures import title
from fedlora.files import replace_file
from fedlora_server.observer import jsonable
from fedlora_server.run_setup import planned

from .population import Method, Population, check_sizes
from .results import LOWER_IS_BETTER, Result
from .sweep import Setting, combinations, told, with_values

SHARE = 5
"""One in this many privacy units of the training rows is held out."""

FILE = "tuning.json"

SELDOM = 10**9
"""A value of --eval-every with which only the start and the last round are evaluated."""


@dataclass(frozen=True)
class Tuning:
    """What --tune asks for.

    Attributes:
        candidates: the combinations of values to try: as texts by the options' names, and parsed by the fields' names.
        combinations: number of all combinations.
        names: the options' names.
    """

    candidates: tuple[tuple[Mapping[str, str], Mapping[str, Any]], ...]
    combinations: int
    names: tuple[str, ...]

    @classmethod
    def of(cls, options: SimulationConfig) -> Tuning:
        """Return what the options ask for. Which candidates a budget leaves is drawn with the first seed.

        Raises:
            ValueError: an option cannot be tuned, is swept too, or a value is not one that it takes.
        """
        for name in options.tune:
            if name in options.sweep:
                raise ValueError(f"--tune: {name} is swept too; leave it out of one of the two")
            if name in ("epsilon", "delta", "declared-size", "rows-per-unit", "partition", "clients", "eval-every",
                        "max-length", "model", "privacy-unit"):
                raise ValueError(f"--tune: {name} cannot be tuned: it changes what is compared. Sweep it")
        found = list(combinations(options.tune, "--tune"))
        every = len(found)
        if options.tune_budget is not None and options.tune_budget < every:
            drawn = np.random.default_rng(options.seeds[0]).choice(every, options.tune_budget, replace=False)
            found = [found[at] for at in sorted(drawn.tolist())]
        return cls(tuple(found), every, tuple(options.tune))

    @property
    def count(self) -> int:
        """Number of runs for each method and setting."""
        return len(self.candidates)

    def told(self) -> str:
        """Return what is searched, with how many runs and on which rows, without the full stop."""
        way = ("all" if self.count == self.combinations
               else f"{self.count}, drawn at random, of the {self.combinations}")
        return (f"--tune searches {' and '.join(self.names)} for each method and setting, over {way} combinations of "
                f"the given values: {self.count} run{'s' * (self.count != 1)} each, with one seed, on four fifths of "
                "the training rows, judged on the other fifth; --eval-data plays no part")

    def check(self, options: SimulationConfig, methods: Sequence[Method], population: Population) -> None:
        """Check that every trial can sample from fewer rows, and that the values fit each other.

        Args:
            options: the options of one setting.
            methods: the methods.
            population: the setting's clients and rows, of the first seed.

        Raises:
            ValueError: they cannot.
        """
        fewer = self.population(options, population, options.seeds[0])
        for texts, own in self.trials(options):
            try:
                for method in methods:
                    planned(method.options(own), method.strategy)
            except ValueError as error:
                raise ValueError(f"--tune {told(texts)}: {error}") from None
            try:
                check_sizes(own, methods, fewer, options.seeds[0])
            except ValueError as error:
                raise ValueError(f"--tune {told(texts)}, on four fifths of the rows: {error}") from None

    def trials(self, options: SimulationConfig) -> Iterator[tuple[Mapping[str, str], SimulationConfig]]:
        """Yield each candidate's values, and the options of its run, for one setting.

        Args:
            options: the options of the setting.
        """
        for texts, values in self.candidates:
            yield texts, replace(with_values(options, values), eval_every=SELDOM)

    def final(self, options: SimulationConfig, texts: Mapping[str, str]) -> SimulationConfig:
        """Return the options of a setting with the values of one candidate, for the runs that are reported.

        Args:
            options: the options of the setting.
            texts: the candidate's values.
        """
        return with_values(options, next(values for known, values in self.candidates if known == texts))

    def population(self, options: SimulationConfig, population: Population, seed: int) -> Population:
        """Return the clients of the trials: without the rows held out, which are there to be evaluated on instead.

        All rows of a privacy unit go the same way. Rows without a label or answer are never held out.

        Args:
            options: the options of the setting.
            population: the setting's clients and rows.
            seed: decides which rows are held out.

        Raises:
            ValueError: there are too few rows.
        """
        rows = population.rows
        units = np.unique(np.array(rows.units), return_inverse=True)[1] if rows.units else np.arange(len(rows))
        count = int(units.max()) + 1 if len(units) else 0
        if count < SHARE:
            raise ValueError(f"--tune holds out one in {SHARE} records or units, and --data has {count}")
        drawn = np.random.default_rng([seed, count]).permutation(count)[:count // SHARE]
        answered = np.array([rows.answers is None or answer is not None for answer in rows.answers or rows.texts])
        held = np.isin(units, drawn) & answered
        left = np.flatnonzero(~np.isin(units, drawn))
        return Population(rows.take(left), {}, population.labels,
                          rows.take(np.flatnonzero(held))).dealt(options, seed)

    def write(self, out: Path, trials: Iterable[Trials]) -> None:
        """Write tuning.json: every trial and what was chosen."""
        about = {"how": self.told(), "methods": [one.described() for one in trials]}
        replace_file(out / FILE, f"{json.dumps(jsonable(about), indent=1, allow_nan=False)}\n".encode(), 0o666)


@dataclass
class Trials:
    """The trials for one method with one setting.

    Attributes:
        setting: the setting.
        method: the method.
        tried: each trial's values, the options of the runs that are reported if they are chosen, and its result.
    """

    setting: Setting
    method: Method
    tried: list[tuple[Mapping[str, str], SimulationConfig, Result]] = field(default_factory=list)

    def add(self, values: Mapping[str, str], options: SimulationConfig, result: Result) -> None:
        """Add a trial.

        Args:
            values: its values.
            options: the options of the runs that are reported if it is chosen.
            result: what it measured.
        """
        self.tried.append((values, options, result))

    @property
    def _best(self) -> tuple[Mapping[str, str], SimulationConfig, Result]:
        """The best trial; the first one if several are as good, or if all ended early."""
        def badness(trial: tuple[Mapping[str, str], SimulationConfig, Result]) -> float:
            result = trial[2]
            if result.status != "finished" or not math.isfinite(result.value):
                return math.inf
            return result.value if result.metric in LOWER_IS_BETTER else -result.value

        return min(self.tried, key=badness)

    @property
    def values(self) -> Mapping[str, str]:
        """The chosen values."""
        return self._best[0]

    @property
    def options(self) -> SimulationConfig:
        """The options of the runs that are reported."""
        return self._best[1]

    def told(self) -> str:
        """Return each trial's figure and the choice, in a line."""
        figures = ", ".join(f"{told(values)} {result.value:.3f}" if result.status == "finished" else
                            f"{told(values)} {result.status}" for values, _, result in self.tried)
        metric = title(self._best[2].metric or "")
        return f"{self.setting.before}{self.method}: {metric} with {figures}; chosen: {told(self.values)}"

    def described(self) -> dict[str, object]:
        """Return the trials for tuning.json."""
        return {"method": str(self.method), "setting": dict(self.setting.values), "chosen": dict(self.values),
                "trials": [{"values": dict(values), "status": result.status, "figure": result.metric,
                            "value": result.value, "folder": result.folder} for values, _, result in self.tried]}
