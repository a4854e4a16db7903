"""The lifetime budget: how much of it each data set has spent, and whether one more run fits. No file is touched here.

Unit: one record, or in runs whose unit is a column all rows that share a value of it (one person, say). Relation:
zero-out, as in `fedlora.privacy.accounting`. All runs that are charged to one budget protect the same unit. A run that
protects rows could be charged to a person by group privacy at k, where k is the most rows of one person. But k
would have to be known for the data as they were at that run, and for every data set that shares a record with them and
lacks the column. It is not known, so such a run is refused.

The lifetime (epsilon, delta) is kept by a Rényi filter (Feldman & Zrnic, NeurIPS 2021, arXiv:2008.11193). The orders
are fixed when the budget is created. At each order, the Rényi divergences of all that was charged are summed. A run
fits if at one of the orders this sum, converted to an epsilon, is at most the limit. Later runs are chosen after seeing
earlier outputs, and so is the order at which the sum is smallest. With a single order the filter would keep (epsilon,
delta) as it is. To allow a choice among k orders, the conversion is made at delta / k (union bound). This is why
`FILTER_ORDERS` are few: 14 orders add about a sixth to a third to RDP's epsilon.

A data set's only run needs no filter. Its parameters were fixed before any output was seen, so PRV's epsilon at its
planned maximum is enough. A run that fits for this reason only *closes* the budget: from its first training on, its
whole planned maximum counts, whatever it really did. The filter's sum then stays above the limit, no further run fits,
and nothing that was seen can influence the guarantee.

A run with secure sums is charged for this client's own noise, or for that of the sums if the owner's policy relies on
the other members. Then a part of delta is set aside for what rounding to the sums' grid changes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedlora.privacy import renyi
from fedlora.privacy.accounting import Accountant
from fedlora.privacy.ledger.rosters import RosterFacts
from fedlora.privacy.ledger.terms import RunTerms
from fedlora.privacy.rounding import rounding_delta
from fedlora.privacy.spend import Spend, rdp

FILTER_ORDERS = (2, 2.5, 3, 3.5, 4, 5, 7, 9, 13, 17, 25, 33, 65, 129)
"""Rényi orders of a new budget's filter. They are dense among small orders, which are best if there is little noise."""

Event = Mapping[str, Any]
"""One event as parsed JSON: sequence, kind, time (seconds since 1970) and body."""


class LedgerError(ValueError):
    """The ledger cannot be trusted, or cannot be used as asked. The message names the file and the remedy."""


class BudgetExhausted(LedgerError):
    """A lifetime budget, or the run's own maximum of trainings, does not allow what was asked."""


@dataclass(frozen=True)
class Charge:
    """The charge for one training. It counts as spent unless it was voided.

    Attributes:
        sequence: place among all events of the ledger. This, never the time, is the order.
        dataset: the owner's id of the data set.
        run_id: the run.
        round: round of the run; 0 is a private start.
        attempt: attempt at this round.
        steps: steps charged, whether or not they were finished.
        state: "reserved", "stored", "released", or "voided" (nothing was read, so it costs nothing).
        time: seconds since 1970 by the machine's clock; recorded and not trusted.
        terms: the run's terms.
        sha256: hash of the stored update's bytes; None before it is stored.
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
    """A lifetime budget as it was declared at one time. The latest one counts; earlier ones stay on record.

    Attributes:
        time: seconds since 1970; not trusted.
        epsilon: limit over all runs, for one unit under the zero-out relation; infinite for no limit.
        delta: the delta of that limit.
        orders: Rényi orders of the filter, taken from the first declaration.
        distinct: data sets declared to share nobody with this one.
        unit: the unit that the limit protects: "row" or "column:NAME".
    """

    time: float
    epsilon: float
    delta: float
    orders: tuple[float, ...]
    distinct: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Lifetime:
    """A data set's lifetime budget and what is left of it. Data sets that overlap it count too.

    Attributes:
        epsilon: the limit; None if none was declared.
        delta: the delta of the limit; None if none was declared.
        spent: epsilon at delta of what counts as spent: every training begun and not voided, or the planned maximum of
            a run that closed the budget; infinite if a training had no noise.
        committed: `spent`, with all that unfinished runs may still begin.
        remaining: epsilon minus `committed`, or 0 if the budget is closed; None without a limit.
        closed_by: the run that fits only as the data set's sole run, and so closed the budget; None if there is none.
        declared: all declarations, oldest first.
        charged: epsilon at delta of the trainings really begun, even if a run closed the budget.
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
    """A run as the events describe it.

    Attributes:
        dataset: the owner's id of the data set.
        terms: the run's terms.
        closes: data sets whose budgets this run fits only as their sole run, and so closes once it has begun a
            training.
        active: whether the run still reserves its planned maximum; False once it has ended.
        begun: number of trainings charged and not voided.
        rosters: digest → the roster of secure sums under which trainings were begun, in their order.
    """

    dataset: str
    terms: RunTerms
    closes: frozenset[str]
    active: bool = True
    begun: int = 0
    rosters: dict[str, RosterFacts] = field(default_factory=dict)

    @property
    def charged(self) -> int:
        """The number of trainings that count as spent. A run that has begun none has closed no budget."""
        return self.terms.max_participations if self.closes and self.begun else self.begun

    @property
    def committed(self) -> int:
        """The number of trainings that count as spent or as reserved."""
        return self.terms.max_participations if self.active else self.charged


@dataclass
class Book:
    """The ledger's state, derived from its events. Events change it by `apply` only, in their order.

    Attributes:
        ledger: the first event's body: ledger_id, simulated, anew, format.
        rows: number of events applied.
        head: the chain's hash after them, 64 hexadecimal digits; "" before the first.
        key_sha256: SHA-256 of the fingerprint key; None before it was made.
        declarations: data set → its lifetime budgets, oldest first.
        registered: data set → (number of its fingerprints, SHA-256 over them in sorted order).
        shares: data set → the data sets with which it shares a fingerprint.
        runs: (data set, run id) → the run.
        charges: sequence number → the charge.
        sequences: (data set, run id) → the sequence numbers of its charges, in order.
        marks: the contradictions by witnesses that the owner accepted.
        places: data set → where its data were last found, ordered by when that was recorded.
    """

    ledger: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 0
    head: str = ""
    key_sha256: str | None = None
    declarations: dict[str, list[Declaration]] = field(default_factory=dict)
    registered: dict[str, tuple[int, str]] = field(default_factory=dict)
    shares: dict[str, set[str]] = field(default_factory=dict)
    runs: dict[tuple[str, str], Run] = field(default_factory=dict)
    charges: dict[int, Charge] = field(default_factory=dict)
    sequences: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    marks: list[Mapping[str, Any]] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def apply(self, sequence: int, text: str, sha256: str) -> None:
        """Apply the next event.

        Args:
            sequence: its number, one more than the last event's.
            text: its canonical JSON.
            sha256: the chain's hash after it, 64 hexadecimal digits.

        Raises:
            LedgerError: the event does not continue the chain, or its content is not possible at this point.
        """
        if sequence != self.rows + 1 or sha256 != chained(self.head, text):
            raise LedgerError(f"row {sequence} does not continue the chain after row {self.rows}")
        try:
            event = json.loads(text)
            if event["sequence"] != sequence:
                raise ValueError("it holds another row's content")
            getattr(self, "_" + event["kind"])(event, **event["body"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise LedgerError(f"row {sequence} cannot be understood ({type(error).__name__}: {error})") from error
        self.rows, self.head = sequence, sha256

    # One method per kind of event, named after the kind. Its arguments are the event and the fields of its body.

    def _ledger(self, event: Event, **about: Any) -> None:
        if self.ledger:
            raise ValueError("the ledger begins a second time")
        self.ledger = about

    def _mark(self, event: Event, **about: Any) -> None:
        self.marks.append(about)

    def _key(self, event: Event, sha256: str) -> None:
        self.key_sha256 = sha256

    def _declare(self, event: Event, dataset: str, epsilon: float | None, delta: float, orders: Sequence[float],
                 distinct: Sequence[str], unit: str) -> None:
        self.limit(dataset, Declaration(event["time"], math.inf if epsilon is None else epsilon, delta, tuple(orders),
                                        tuple(distinct), unit))

    def _register(self, event: Event, dataset: str, records: int, sha256: str, shares: Sequence[str]) -> None:
        self.registered[dataset] = (records, sha256)
        for other in shares:
            self.shares.setdefault(dataset, set()).add(other)
            self.shares.setdefault(other, set()).add(dataset)

    def _data(self, event: Event, dataset: str, place: str) -> None:
        self.places.pop(dataset, None)  # so that the latest is last
        self.places[dataset] = place

    def _run(self, event: Event, dataset: str, terms: Mapping[str, Any], closes: Sequence[str]) -> None:
        known = self.runs.get((dataset, terms["run_id"]))
        if known is None:
            known = self.runs[dataset, terms["run_id"]] = Run(dataset, RunTerms(**terms), frozenset())
        known.closes, known.active = known.closes | frozenset(closes), True

    def _end(self, event: Event, dataset: str, run_id: str) -> None:
        self.runs[dataset, run_id].active = False

    def _roster(self, event: Event, dataset: str, run_id: str, **facts: Any) -> None:
        self.runs[dataset, run_id].rosters[facts["digest"]] = RosterFacts(**facts)

    def _reserved(self, event: Event, dataset: str, run_id: str, round: int, attempt: int) -> None:
        run = self.runs[dataset, run_id]
        run.begun += 1
        self.sequences.setdefault((dataset, run_id), []).append(event["sequence"])
        self.charges[event["sequence"]] = Charge(event["sequence"], dataset, run_id, round, attempt,
                                                 run.terms.local_steps, "reserved", event["time"], run.terms)

    def _stored(self, event: Event, charge: int, sha256: str) -> None:
        self._advance(charge, "reserved", state="stored", sha256=sha256)

    def _released(self, event: Event, charge: int) -> None:
        self._advance(charge, "stored", state="released")

    def _voided(self, event: Event, charge: int) -> None:
        self._advance(charge, "reserved", state="voided")
        self.runs[self.charges[charge].dataset, self.charges[charge].run_id].begun -= 1

    def _advance(self, sequence: int, expected: str, **changes: Any) -> None:
        charge = self.charges[sequence]
        if charge.state != expected:
            raise ValueError(f"charge {sequence} is {charge.state}, not {expected}")
        self.charges[sequence] = replace(charge, **changes)

    def limit(self, dataset: str, declared: Declaration) -> None:
        """Make this declaration the data set's current one."""
        self.declarations.setdefault(dataset, []).append(declared)

    def charge(self, dataset: str, run_id: str, round: int, attempt: int) -> Charge | None:
        """Return the charge of this training that was not voided; None if there is none."""
        return next((c for c in self.charges_of(dataset, run_id) if c.state != "voided"
                     and (c.round, c.attempt) == (round, attempt)), None)

    def charges_of(self, dataset: str, run_id: str) -> Iterator[Charge]:
        """Yield a run's charges in order, voided ones included."""
        return (self.charges[sequence] for sequence in self.sequences.get((dataset, run_id), ()))

    def declared(self, dataset: str) -> Declaration | None:
        """Return the data set's current lifetime budget; None if none was declared."""
        return self.declarations.get(dataset, [None])[-1]

    def overlapping(self, dataset: str) -> tuple[str, ...]:
        """Return the other data sets that share a record with this one, unless either declares the other distinct."""
        return tuple(sorted(self.shares.get(dataset, set()) - set(self.distinct(dataset))))

    def distinct(self, dataset: str) -> tuple[str, ...]:
        """Return the data sets that this one declares distinct, and those that declare this one distinct."""
        own = self.declared(dataset)
        by_others = {other for other in self.declarations if dataset in self.declarations[other][-1].distinct}
        return tuple(sorted(by_others | set(own.distinct if own else ())))

    def counted(self, dataset: str) -> list[Run]:
        """Return the runs that count against the data set's budget: its own and those of overlapping data sets."""
        names = {dataset, *self.overlapping(dataset)}
        return [run for run in self.runs.values() if run.dataset in names and run.committed]

    def admit(self, dataset: str, terms: RunTerms) -> frozenset[str] | None:
        """Decide whether a run fits.

        The budgets concerned are that of `dataset` and those of all data sets that overlap it. The run must protect the
        same unit as each of them. Its planned maximum must fit each of them, beside all that is charged to or reserved
        for other runs.

        Returns:
            The data sets whose budgets the run would close, usually none; None if the run does not fit.
        """
        closes = set()
        for name in (dataset, *self.overlapping(dataset)):
            if self.other_unit(name, terms) is not None:
                return None
            limit = self.declared(name)
            if limit is None or self._room(limit, name, dataset, terms):
                continue
            if (self._beside(name, dataset, terms) or terms.noise is None
                    or terms.epsilon(terms.max_participations, limit.delta) > limit.epsilon):
                return None
            closes.add(name)
        return frozenset(closes)

    def room_for(self, runs: int, dataset: str, terms: RunTerms) -> bool:
        """Return whether a number of runs on these terms, one after the other, fit every budget concerned.

        Only the filter's rule is used: a run that closes a budget leaves no room for another.

        Args:
            runs: number of runs.
            dataset: the data set.
            terms: terms of each run.
        """
        return all((limit := self.declared(name)) is None or self._room(limit, name, dataset, terms, runs)
                   for name in (dataset, *self.overlapping(dataset)))

    def _room(self, limit: Declaration, name: str, dataset: str, terms: RunTerms, runs: int = 1) -> bool:
        """Return whether a number of runs of `dataset` on these terms fit the limit of `name`, by the filter."""
        if limit.epsilon == math.inf:
            return True
        spends = [*self._beside(name, dataset, terms), *[terms.spends(terms.max_participations)] * runs]
        return filter_epsilon(spends, self._steps_delta(name, limit.delta, terms), limit.orders) <= limit.epsilon

    def _steps_delta(self, name: str, delta: float, *further: RunTerms) -> float:
        """Return the part of a delta that is left for the steps of all runs that count against the budget of `name`."""
        return min((terms.steps_delta(delta) for terms in (*(run.terms for run in self.counted(name)), *further)),
                   default=delta)

    def _beside(self, name: str, dataset: str, terms: RunTerms) -> list[tuple[Spend, ...] | None]:
        """Return the steps that count against the budget of `name`, without those of this run of `dataset`."""
        return [run.terms.spends(run.committed) for run in self.counted(name)
                if (run.dataset, run.terms.run_id) != (dataset, terms.run_id)]

    def other_unit(self, name: str, terms: RunTerms) -> tuple[str, str] | None:
        """Return a (data set, unit) that counts against the budget of `name` and protects another unit than this run.

        The unit is the limit's own or that of a run that counts. None if all agree, or if this run has no noise.
        """
        limit = self.declared(name)
        units = [(name, limit.unit)] if limit else []
        units += [(run.dataset, run.terms.unit) for run in self.counted(name) if run.terms.noise_multiplier is not None]
        found = next((held for held in units if held[1] != terms.unit), None)
        return None if terms.noise_multiplier is None else found

    def lifetime(self, dataset: str) -> Lifetime:
        """Return a data set's limit, spent and remaining epsilon, counting the data sets that overlap it too."""
        limit, runs = self.declared(dataset), self.counted(dataset)
        delta, orders = self._accounted(dataset)

        def epsilon(participations: Iterable[int]) -> float:
            spends = [run.terms.spends(count) for run, count in zip(runs, participations, strict=True)]
            filtered = filter_epsilon(spends, delta, orders)
            if len(runs) == 1 and dataset in runs[0].closes and spends[0] and delta is not None:
                return min(filtered, Accountant(spends[0]).epsilon(delta))  # PRV holds for a sole run; see the module
            return filtered

        spent, committed = epsilon(run.charged for run in runs), epsilon(run.committed for run in runs)
        charged = epsilon(run.begun for run in runs)
        if limit is None:
            return Lifetime(None, None, spent, committed, None, None, (), charged)
        filtered = filter_epsilon([run.terms.spends(run.committed) for run in runs], delta, orders)
        closing = next((run for run in runs if dataset in run.closes), None) if filtered > limit.epsilon else None
        remaining = 0.0 if closing else max(0.0, limit.epsilon - committed)
        return Lifetime(limit.epsilon, limit.delta, spent, committed, remaining,
                        closing.terms.run_id if closing else None, tuple(self.declarations[dataset]), charged)

    def rounding(self, dataset: str) -> float:
        """Return what rounding adds to the delta of a data set's budget, in all secure sums whose noise is charged.

        It is computed at the epsilon that is spent or reserved.
        """
        runs = [run for run in self.counted(dataset) if run.terms.aggregate_noise_multiplier is not None]
        epsilon = self.lifetime(dataset).committed if runs else 0.0
        return sum(max((rounding_delta(one.deviation, one.honest, coordinates=one.values * run.committed,
                                       epsilon=epsilon) for one in run.rosters.values()), default=0.0) for run in runs)

    def spent_after(self, dataset: str, further: Sequence[Spend]) -> float:
        """Return the epsilon spent once `further` is spent too, by the filter; infinite if a run had no noise."""
        charged = [run.terms.spends(run.charged) for run in self.counted(dataset)]
        return filter_epsilon([*charged, further], *self._accounted(dataset))

    def _accounted(self, dataset: str) -> tuple[float | None, Sequence[float]]:
        """Return the delta for the steps, and the orders, by which everything is added up.

        The delta is the limit's, or without a limit the smallest of a run (None without a run), less what is set aside.
        """
        if limit := self.declared(dataset):
            return self._steps_delta(dataset, limit.delta), limit.orders
        deltas = [run.terms.delta for run in self.counted(dataset) if run.terms.delta]
        return (self._steps_delta(dataset, min(deltas)) if deltas else None), FILTER_ORDERS


def chained(head: str, text: str) -> str:
    """Return the chain's hash after one more event: SHA-256 of the previous hash, a line break and the event's text."""
    return hashlib.sha256(f"{head}\n{text}".encode()).hexdigest()


def filter_epsilon(spends: Collection[Sequence[Spend] | None], delta: float | None, orders: Sequence[float]) -> float:
    """Return the epsilon at `delta` of everything spent, by the filter's rule (arXiv:2008.11193; see the module).

    At each order the Rényi divergences are summed and converted at delta / len(orders), where a negative conversion
    term counts as 0. The smallest result counts.

    Args:
        spends: the steps of each run; None for a run without noise.
        delta: in (0, 1); may be None only if nothing finite was spent.
        orders: Rényi orders, fixed when the budget was created.

    Returns:
        0.0 if nothing was spent; infinity if a run had no noise.
    """
    if any(spend is None for spend in spends):
        return math.inf
    parts = [rdp(part, tuple(orders)) for spend in spends if spend for part in spend]
    if not parts:
        return 0.0
    assert delta is not None, "a finite spend has a delta"
    conversion = renyi.conversion(orders, delta / len(orders))
    return float(np.min(np.sum(parts, axis=0) + np.maximum(conversion, 0.0)))
