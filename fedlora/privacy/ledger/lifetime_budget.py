"""How much of a dataset's lifetime is spent, and whether one more run fits: a book of events, without any file.

Unit: one record, or one person where the run's unit is a column. Relation: zero-out, as in `accounting`. All that is
charged to one budget protects the same unit. A run by rows could be charged to a person by group privacy at k, the most
rows of one person, only if k were known for the data as they were then, and for every data set that shares a record
with them and has no such column. It is not, so such a run is refused.

The lifetime (epsilon, delta) is kept by a Rényi filter (Feldman & Zrnic, NeurIPS 2021, arXiv:2008.11193): what was
charged is summed at each of the orders that were fixed when the budget was created, and a run fits while at one of
them the sum, converted, is at most epsilon. Later runs are chosen after seeing earlier outputs, and with them the
order at which the sum is smallest. A single order would keep (epsilon, delta); to leave the choice among k of them
open, the conversion is made at delta / k (union bound). Hence `FILTER_ORDERS` are few: 14 of them add about a
sixth to a third to RDP's epsilon.

A dataset's only run needs no filter: its parameters were fixed before anything was seen, so PRV's epsilon at its
planned maximum is enough. A run that was admitted on that ground alone closes the budget: all that it was planned to
spend counts from then on, whatever it did, so the sum stays above the limit and nothing that was seen decides over
the guarantee.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlora.privacy import renyi
from fedlora.privacy.accounting import Accountant, Spend
from fedlora.privacy.spend import rdp

FILTER_ORDERS = (2, 2.5, 3, 3.5, 4, 5, 7, 9, 13, 17, 25, 33, 65, 129)
"""Dense where epsilon is large (little noise), since there the best order is small."""


class LedgerError(ValueError):
    """The ledger cannot be trusted or used as asked. The message names the file and the remedy."""


class BudgetExhausted(LedgerError):
    """The lifetime of the dataset, or the run's most participations, do not allow it."""


@dataclass(frozen=True)
class RunTerms:
    """What is fixed while a run lasts.

    Attributes:
        run_id, plan_sha256: which run, and the digest of its plan.
        unit: "row" or "column:NAME".
        declared_size: public nominal number of units.
        sampling_rate: probability with which each unit enters a step.
        noise_multiplier: noise std / clip_norm; None where privacy is off, which is recorded as infinite.
        delta: of the run's own guarantee; None where privacy is off.
        clip_norm: L2, in units of the scaled update.
        scales: factor per group of tensors.
        local_steps: steps of one participation.
        max_participations: the most trainings that this run may begin.
        relation: of neighbouring data, for which the noise was chosen.
        accountant: with which it was chosen.

    Raises:
        ValueError: a value is out of range; it names the value.
    """

    run_id: str
    plan_sha256: str
    unit: str
    declared_size: int
    sampling_rate: float
    noise_multiplier: float | None
    delta: float | None
    clip_norm: float
    scales: Mapping[str, float]
    local_steps: int
    max_participations: int
    relation: str = "zero-out"
    accountant: str = "PRV or RDP"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", dict(self.scales))
        if not self.run_id:
            raise ValueError("run_id is empty; a run is charged under its id")
        for name in ("declared_size", "local_steps", "max_participations"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        if self.noise_multiplier is None:
            if not 0 < self.sampling_rate <= 1:
                raise ValueError(f"sampling_rate is {self.sampling_rate!r}; it must be in (0, 1]")
        else:
            Spend(self.noise_multiplier, self.sampling_rate, 1)  # raises where they are out of range
            if self.delta is None or not 0 < self.delta < 1:
                raise ValueError(f"delta is {self.delta!r}; a run with noise needs one in (0, 1)")

    def spends(self, participations: int) -> tuple[Spend, ...] | None:
        """What so many participations cost; None where that is infinite."""
        if not participations:
            return ()
        if self.noise_multiplier is None:
            return None
        return (Spend(self.noise_multiplier, self.sampling_rate, participations * self.local_steps),)


@dataclass(frozen=True)
class Charge:
    """One training that was begun, or was about to.

    Attributes:
        sequence: its place among all events of the ledger; this, and never the time, is the order.
        state: "reserved", "stored", "released", or "voided" (nothing was read; it costs nothing).
        time: seconds since 1970 by the machine's clock, recorded and not trusted.
        sha256: of the stored update's bytes; None before it is stored.
    """

    sequence: int
    dataset: str
    run_id: str
    round: int
    attempt: int
    steps: int
    state: str
    time: float
    terms: RunTerms
    sha256: str | None = None


@dataclass(frozen=True)
class Declaration:
    """A lifetime budget as it was declared at one time; the latest counts, the earlier ones stay visible.

    Attributes:
        time: seconds since 1970, not trusted.
        epsilon: infinite for a dataset without limit.
        delta: of the lifetime.
        orders: Rényi orders of the filter, from the first declaration.
        distinct: datasets declared to share nobody with this one.
        unit: "row" or "column:NAME", for whom the limit is.
    """

    time: float
    epsilon: float
    delta: float
    orders: tuple[float, ...]
    distinct: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Lifetime:
    """A dataset's budget and what is left of it, over the dataset and all that overlap it.

    Attributes:
        epsilon, delta: the limit; None where none was declared.
        spent: epsilon, at delta, of every training begun and not voided; infinite where one had no noise.
        committed: the same with all that unfinished runs may still begin.
        remaining: epsilon less committed, 0 where the budget is closed; None without a limit.
        closed_by: the run that was admitted as the only one and closed the budget.
        declared: all declarations, the first one first.
        charged: epsilon of the trainings that were begun alone, whatever closed the budget.
    """

    epsilon: float | None
    delta: float | None
    spent: float
    committed: float
    remaining: float | None
    closed_by: str | None
    declared: tuple[Declaration, ...]
    charged: float


@dataclass
class Run:
    """A run in the book: `active` until it is ended; `closes` are the budgets that it was admitted to alone."""

    dataset: str
    terms: RunTerms
    closes: frozenset[str]
    active: bool = True
    begun: int = 0

    @property
    def charged(self) -> int:
        """Participations that count as spent. A run of which nothing was read has closed nothing."""
        return self.terms.max_participations if self.closes and self.begun else self.begun

    @property
    def committed(self) -> int:
        return self.terms.max_participations if self.active else self.charged


@dataclass
class Book:
    """What the events say so far. It is only ever changed by `apply`, in the order of the events."""

    ledger: Mapping = field(default_factory=dict)
    rows: int = 0
    head: str = ""
    key_sha256: str | None = None
    declarations: dict[str, list[Declaration]] = field(default_factory=dict)
    registered: dict[str, tuple[int, str]] = field(default_factory=dict)
    shares: dict[str, set[str]] = field(default_factory=dict)
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    charges: dict[int, Charge] = field(default_factory=dict)
    sequences: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    marks: list[Mapping] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def apply(self, sequence: int, text: str, sha256: str) -> None:
        """Take in the next event: `text` is its canonical JSON, `sha256` the chain's head after it.

        Raises:
            LedgerError: it does not continue the chain, or says something that cannot be.
        """
        if sequence != self.rows + 1 or sha256 != chained(self.head, text):
            raise LedgerError(f"row {sequence} does not continue the chain after row {self.rows}")
        try:
            event = json.loads(text)
            if event["sequence"] != sequence:
                raise ValueError("another row's content")
            getattr(self, "_" + event["kind"])(event, **event["body"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LedgerError(f"row {sequence} cannot be understood ({type(error).__name__}: {error})") from error
        self.rows, self.head = sequence, sha256

    def _ledger(self, event, **about) -> None:
        if self.ledger:
            raise ValueError("a second beginning")
        self.ledger = about

    def _mark(self, event, **about) -> None:
        self.marks.append(about)

    def _key(self, event, sha256) -> None:
        self.key_sha256 = sha256

    def _declare(self, event, dataset, epsilon, delta, orders, distinct, unit) -> None:
        self.limit(dataset, Declaration(event["time"], math.inf if epsilon is None else epsilon, delta, tuple(orders),
                                        tuple(distinct), unit))

    def _register(self, event, dataset, records, sha256, shares) -> None:
        self.registered[dataset] = (records, sha256)
        for other in shares:
            self.shares.setdefault(dataset, set()).add(other)
            self.shares.setdefault(other, set()).add(dataset)

    def _data(self, event, dataset, place) -> None:
        self.places.pop(dataset, None)  # the latest stands last
        self.places[dataset] = place

    def _run(self, event, dataset, terms, closes) -> None:
        known = self.runs.get((dataset, terms["run_id"]))
        if known is None:
            known = self.runs[dataset, terms["run_id"]] = Run(dataset, RunTerms(**terms), frozenset())
        known.closes, known.active = known.closes | frozenset(closes), True

    def _end(self, event, dataset, run_id) -> None:
        self.runs[dataset, run_id].active = False

    def _reserved(self, event, dataset, run_id, round, attempt) -> None:
        run = self.runs[dataset, run_id]
        run.begun += 1
        self.sequences.setdefault((dataset, run_id), []).append(event["sequence"])
        self.charges[event["sequence"]] = Charge(event["sequence"], dataset, run_id, round, attempt,
                                                 run.terms.local_steps, "reserved", event["time"], run.terms)

    def _stored(self, event, charge, sha256) -> None:
        self._advance(charge, "reserved", state="stored", sha256=sha256)

    def _released(self, event, charge) -> None:
        self._advance(charge, "stored", state="released")

    def _voided(self, event, charge) -> None:
        self._advance(charge, "reserved", state="voided")
        self.runs[self.charges[charge].dataset, self.charges[charge].run_id].begun -= 1

    def _advance(self, sequence: int, expected: str, **changes) -> None:
        charge = self.charges[sequence]
        if charge.state != expected:
            raise ValueError(f"charge {sequence} is {charge.state}, not {expected}")
        self.charges[sequence] = replace(charge, **changes)

    def limit(self, dataset: str, declared: Declaration) -> None:
        """From now on this limit counts."""
        self.declarations.setdefault(dataset, []).append(declared)

    def charge(self, dataset: str, run_id: str, round: int, attempt: int) -> Charge | None:
        """The charge of this training that was not voided."""
        return next((c for c in self.charges_of(dataset, run_id) if c.state != "voided"
                     and (c.round, c.attempt) == (round, attempt)), None)

    def charges_of(self, dataset: str, run_id: str) -> Iterator[Charge]:
        """A run's charges, in order."""
        return (self.charges[sequence] for sequence in self.sequences.get((dataset, run_id), ()))

    def declared(self, dataset: str) -> Declaration | None:
        return self.declarations.get(dataset, [None])[-1]

    def overlapping(self, dataset: str) -> tuple[str, ...]:
        """The datasets that share a record with this one, unless either of the two declares them distinct."""
        return tuple(sorted(self.shares.get(dataset, set()) - set(self.distinct(dataset))))

    def distinct(self, dataset: str) -> tuple[str, ...]:
        """The datasets that this one declares distinct, and those that declare it so."""
        own = self.declared(dataset)
        by_others = {other for other in self.declarations if dataset in self.declarations[other][-1].distinct}
        return tuple(sorted(by_others | set(own.distinct if own else ())))

    def counted(self, dataset: str) -> list[Run]:
        """The runs whose trainings someone in `dataset` pays for."""
        names = {dataset, *self.overlapping(dataset)}
        return [run for run in self.runs.values() if run.dataset in names and run.committed]

    def admit(self, dataset: str, terms: RunTerms) -> frozenset[str] | None:
        """The budgets that the run would close (usually none); None where it does not fit.

        It has to fit the lifetime of `dataset` and of every dataset that overlaps it, its planned maximum added to
        all that is charged or held for other runs, and protect the unit that they do.
        """
        planned, closes = terms.spends(terms.max_participations), set()
        for name in (dataset, *self.overlapping(dataset)):
            if self.other_unit(name, terms) is not None:
                return None
            limit, others = self.declared(name), self._beside(name, dataset, terms)
            if limit is None or self._room(limit, [*others, planned]):
                continue
            if others or planned is None or Accountant(planned).epsilon(limit.delta) > limit.epsilon:
                return None
            closes.add(name)
        return frozenset(closes)

    def room_for(self, runs: int, dataset: str, terms: RunTerms) -> bool:
        """Whether so many runs on these terms fit every lifetime concerned, one after the other: by the filter alone,
        since a run that closes a budget leaves room for none.
        """
        planned = terms.spends(terms.max_participations)
        return all((limit := self.declared(name)) is None
                   or self._room(limit, [*self._beside(name, dataset, terms), *[planned] * runs])
                   for name in (dataset, *self.overlapping(dataset)))

    @staticmethod
    def _room(limit: Declaration, spends: Collection[Sequence[Spend] | None]) -> bool:
        return limit.epsilon == math.inf or filter_epsilon(spends, limit.delta, limit.orders) <= limit.epsilon

    def _beside(self, name: str, dataset: str, terms: RunTerms) -> list[tuple[Spend, ...] | None]:
        """What the budget of `name` holds for other runs than this one of `dataset`."""
        return [run.terms.spends(run.committed) for run in self.counted(name)
                if (run.dataset, run.terms.run_id) != (dataset, terms.run_id)]

    def other_unit(self, name: str, terms: RunTerms) -> tuple[str, str] | None:
        """(dataset, unit) of a limit or a run that protects another unit than this run, and has one budget with `name`.

        None if there is none, or no privacy.
        """
        limit = self.declared(name)
        units = [(name, limit.unit)] if limit else []
        units += [(run.dataset, run.terms.unit) for run in self.counted(name) if run.terms.noise_multiplier is not None]
        found = next((held for held in units if held[1] != terms.unit), None)
        return None if terms.noise_multiplier is None else found

    def lifetime(self, dataset: str) -> Lifetime:
        """Limit, spent and remaining epsilon of a dataset, with all that overlaps it."""
        limit, runs = self.declared(dataset), self.counted(dataset)
        delta, orders = self._accounted(dataset)

        def epsilon(participations: Iterable[int]) -> float:
            spends = [run.terms.spends(count) for run, count in zip(runs, participations, strict=True)]
            filtered = filter_epsilon(spends, delta, orders)
            if len(runs) == 1 and dataset in runs[0].closes and spends[0] and delta is not None:
                return min(filtered, Accountant(spends[0]).epsilon(delta))  # its planned maximum, whatever it began
            return filtered

        spent, committed = epsilon(run.charged for run in runs), epsilon(run.committed for run in runs)
        charged = epsilon(run.begun for run in runs)
        if limit is None:
            return Lifetime(None, None, spent, committed, None, None, (), charged)
        filtered = filter_epsilon([run.terms.spends(run.committed) for run in runs], limit.delta, orders)
        closing = next((run for run in runs if dataset in run.closes), None) if filtered > limit.epsilon else None
        remaining = 0.0 if closing else max(0.0, limit.epsilon - committed)
        return Lifetime(limit.epsilon, limit.delta, spent, committed, remaining,
                        closing.terms.run_id if closing else None, tuple(self.declarations[dataset]), charged)

    def spent_after(self, dataset: str, further: Sequence[Spend]) -> float:
        """Epsilon spent once this is spent too, by the filter; infinite where a run had no noise."""
        charged = [run.terms.spends(run.charged) for run in self.counted(dataset)]
        return filter_epsilon([*charged, further], *self._accounted(dataset))

    def _accounted(self, dataset: str) -> tuple[float | None, Sequence[float]]:
        """(delta, orders) of the limit; without one, the smallest delta of a run, None where there is none."""
        if limit := self.declared(dataset):
            return limit.delta, limit.orders
        deltas = [run.terms.delta for run in self.counted(dataset) if run.terms.delta]
        return min(deltas, default=None), FILTER_ORDERS


def chained(head: str, text: str) -> str:
    """The head of the chain after one more event, as 64 hex digits."""
    return hashlib.sha256(f"{head}\n{text}".encode()).hexdigest()


def filter_epsilon(spends: Collection[Sequence[Spend] | None], delta: float | None, orders: Sequence[float]) -> float:
    """Epsilon at `delta` by the filter's rule; 0.0 where nothing was spent, infinite where a spend is (None)."""
    if any(spend is None for spend in spends):
        return math.inf
    parts = [rdp(part, tuple(orders)) for spend in spends if spend for part in spend]
    if not parts:
        return 0.0
    assert delta is not None, "a finite spend has a delta"
    conversion = renyi.conversion(orders, delta / len(orders))
    return float(np.min(np.sum(parts, axis=0) + np.maximum(conversion, 0.0)))
