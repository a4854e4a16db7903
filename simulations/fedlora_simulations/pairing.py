"""Groups of results that differ in the seed alone, and paired differences between groups over their common seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fedlora.config import flag

from .comparison import largest_of_sums, mean_and_deviation
from .results import LOWER_IS_BETTER, Result

CONFIDENCE = 0.95

UNKNOWN = "not known"
"""Value of an option that a result does not tell."""


@dataclass(frozen=True)
class Group:
    """The results of one method with one setting, one for each seed.

    Attributes:
        method: the method.
        settings: option → its value, for the options in which the groups differ.
        results: the results, by rising seed.
    """

    method: str
    settings: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        """The group in a line: "fedsvd, epsilon=1"."""
        return ", ".join((self.method, *(f"{name}={value}" for name, value in self.settings.items())))

    @property
    def metric(self) -> str | None:
        """Name of the figure that is compared; None if nothing was evaluated."""
        return self.results[0].metric

    @property
    def ended(self) -> tuple[Result, ...]:
        """The results of the runs that came to their last round, and evaluated it."""
        return tuple(one for one in self.results if one.status == "finished" and one.evaluated)

    @property
    def values(self) -> dict[int, float]:
        """Seed → the figure after the last round, for the runs that came to it."""
        return {one.seed: one.value for one in self.ended}

    @property
    def mean(self) -> float:
        """Mean of `values`; NaN if there are none."""
        return mean_and_deviation(list(self.values.values()))[0] if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation of `values`; 0 for a single one."""
        return mean_and_deviation(list(self.values.values()))[1] if self.values else 0.0

    @property
    def epsilon(self) -> float:
        """Largest ε of the group's runs; infinite without privacy, NaN if it is not known."""
        return max(one.epsilon for one in self.results)

    @property
    def epsilon_of_sums(self) -> float | None:
        """Largest ε of the group's runs towards whoever sees the sums alone; None without secure aggregation."""
        return largest_of_sums(self.results)

    @property
    def asked(self) -> float:
        """The ε that clients allowed (--epsilon); infinite without privacy, NaN if it is not known."""
        return float(self.results[0].options.get("epsilon", math.nan))

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results of runs that ended early."""
        return tuple(one for one in self.results if one.status != "finished")


@dataclass(frozen=True)
class Difference:
    """The difference of a group from its baseline, paired over the seeds that both have.

    Attributes:
        group: the group.
        baseline: the group that it is compared with.
        mean: mean of the differences; NaN without a common seed.
        interval: ends of the 95 % t interval of the mean; None for fewer than two seeds.
        seeds: the common seeds.
    """

    group: Group
    baseline: Group
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def grouped(results: Sequence[Result]) -> list[Group]:
    """Group the results by method and setting, in the order in which they come."""
    names = columns(results)
    groups: dict[tuple[tuple[str, ...], str], list[Result]] = {}
    for result in results:
        key = tuple(value_of(result, name) for name in names)
        groups.setdefault((key, result.method), []).append(result)
    return [Group(method, dict(zip(names, key, strict=True)), tuple(sorted(found, key=lambda one: one.seed)))
            for (key, method), found in groups.items()]


def columns(results: Sequence[Result]) -> list[str]:
    """Return the options in which the results differ: those that were swept, then others that were given.

    Options that --tune chose are left out: they belong to the method, and their values may differ from one to another.
    """
    swept = list(dict.fromkeys(name for result in results for name in result.swept))
    given = list(dict.fromkeys(flag(name) for result in results for name in result.given))
    tuned = {name for result in results for name in result.tuned}
    return [*swept, *(name for name in given if name not in swept and name not in tuned and any(
        len({value_of(one, name) for one in results if one.method == method}) > 1
        for method in {result.method for result in results}))]


def value_of(result: Result, name: str) -> str:
    """Return the value of an option in a result, as text."""
    if name in result.swept:
        return result.swept[name]
    found = result.options.get(name.replace("-", "_"), UNKNOWN)
    return "none" if found is None else _text(found)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_text(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ",".join("=".join(map(_text, one)) if isinstance(one, list | tuple) else _text(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(groups: Sequence[Group], baseline: str | None = None) -> list[Difference]:
    """Return each group's difference from its baseline: that of the baseline method with the same setting.

    Groups without a seed that their baseline has too are left out. If all groups have the same method, they are
    compared with the first of them.

    Args:
        groups: the groups.
        baseline: the method to compare with; None for the first one.

    Raises:
        ValueError: there is no such method.
    """
    methods = list(dict.fromkeys(group.method for group in groups))
    if baseline is not None and baseline not in methods:
        raise ValueError(f"--baseline {baseline}: there is no such method here; choose from {', '.join(methods)}")
    if len(methods) == 1:
        return [one for group in groups[1:] if (one := difference(group, groups[0])).seeds]
    chosen = baseline or methods[0]
    bases = {tuple(group.settings.items()): group for group in groups if group.method == chosen}
    return [one for group in groups if group.method != chosen and (key := tuple(group.settings.items())) in bases
            and (one := difference(group, bases[key])).seeds]


def difference(group: Group, baseline: Group) -> Difference:
    """Return the paired difference of two groups."""
    from scipy.stats import ttest_rel  # imported late: it takes a second

    ours, theirs = group.values, baseline.values
    seeds = tuple(seed for seed in ours if seed in theirs and math.isfinite(ours[seed]) and math.isfinite(theirs[seed]))
    a, b = (np.array([values[seed] for seed in seeds]) for values in (ours, theirs))
    mean = float(np.mean(a - b)) if seeds else math.nan
    interval = None
    if len(seeds) > 1:
        same = all(x == y for x, y in pairwise((a - b).tolist()))
        found = (mean, mean) if same else ttest_rel(a, b).confidence_interval(CONFIDENCE)
        interval = float(found[0]), float(found[1])
    return Difference(group, baseline, mean, interval, seeds)


def best(groups: Sequence[Group]) -> tuple[Group | None, bool]:
    """Return the group with the best mean, and whether it is clearly better than each of the others.

    It is if every paired interval excludes 0. No correction is made for the number of comparisons.

    Args:
        groups: groups of the same setting.
    """
    found = [group for group in groups if math.isfinite(group.mean)]
    if not found:
        return None, False
    lower = found[0].metric in LOWER_IS_BETTER
    first = min(found, key=lambda group: group.mean if lower else -group.mean)
    others = [group for group in groups if group is not first and group.values]
    return first, bool(others) and all(difference(first, other).is_clear for other in others)
