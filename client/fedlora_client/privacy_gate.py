"""The data owner's control over a client: the policy that is asked first, and the ledger that is charged."""

from __future__ import annotations

import logging
from pathlib import Path

from fedlora.config import ClientConfig
from fedlora.data import Rows, check_labels
from fedlora.plan import ROW, Proposal, Refused, RunPlan, unit_column
from fedlora.privacy import About, Budget, DatasetPolicy, Forbidden, Ledger, Policy, RunTerms, four_digits
from fedlora.privacy.about import NOTHING
from fedlora.privacy.ledger import LedgerError
from fedlora.privacy.ledger.fingerprints import fingerprints
from fedlora.privacy.ledger.ledger import admitted
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, Book, Declaration
from fedlora.privacy.ledger.witness import witness_file, witnesses_in
from fedlora.privacy.policy import absolute, check_label_names

from . import paths
from .terms import Limits, private_terms, with_room

log = logging.getLogger(__name__)


class PrivacyGate:
    """The policy and the ledger of the owner of --data, opened and checked before a server is called.

    Args:
        options: the options of fedlora-client.
        trial: work on a copy of the ledger in memory, so that nothing is written; no run can be charged.

    Raises:
        ValueError: the policy or the ledger cannot be trusted, or contradicts the command line.

    Attributes:
        policy: the owner's policy.
        ledger: the ledger that is charged.
        unit: the unit of privacy, "row" or "column:NAME", by the command line or else the policy.
        declared_size: the public number of units, by the command line or else the policy; None if neither has it.
        labels: the label names that a server may be told, by the command line or else the policy; None if neither
            has them.
        dataset: id of the data set that is charged; known before the data are read.
    """

    def __init__(self, options: ClientConfig, *, trial: bool = False) -> None:
        folder: Path | None = options.simulated_ledger
        self.policy = Policy.read(paths.named_policy(options.policy, folder))
        self._data, self._server = str(options.data), options.server
        self._known = self.policy.dataset_at(self._data)
        if folder is not None:
            self._check_made_up(options)
        private = options.epsilon != float("inf")
        if self._known is not None and not private:
            raise ValueError(f"--epsilon inf: the policy {self.policy.path} gives {options.data} a lifetime budget "
                             f"([dataset.{self._known.id}]), and a run without privacy would break it. Take the table "
                             "out of the policy if you want that")
        self.unit: str = options.privacy_unit or (self._known.unit if self._known else ROW)
        self._check_unit()
        self.declared_size: int | None = options.declared_size
        self.labels: tuple[str, ...] | None = options.labels
        if self.labels is not None:
            check_label_names(self.labels, "--labels")
        if self._known is not None:
            self._check_declared(self._known)
        self.ledger = Ledger(folder / "ledger.sqlite" if folder else paths.ledger(), simulated=folder is not None,
                             new=options.new_ledger, trial=trial)
        self.dataset = self._known.id if self._known else self._unlisted()

    def _check_made_up(self, options: ClientConfig) -> None:
        """Check that the data are not known to be real, as a simulated ledger would not charge their budget.

        Raises:
            ValueError: a policy lists the data, or a real ledger left a witness beside them.
        """
        where = f"--simulated-ledger {options.simulated_ledger}: "
        for path in {options.policy or paths.policy(), paths.policy()}:
            if real := Policy.read(path).dataset_around(self._data):
                raise ValueError(f"{where}[dataset.{real.id}] in {path} gives {real.data} a lifetime budget, and a "
                                 "simulated ledger would not charge it. Leave the option out")
        if Path(self._data).exists() and (left := witnesses_in(self._beside)):
            raise ValueError(f"{where}{left[0]} says that a real ledger is kept for these data, and a simulated one "
                             "would not charge it. Leave the option out, or put made-up data in a folder of its own")

    def _check_unit(self) -> None:
        """Raise ValueError if the run would protect another unit of privacy than the lifetime budget does."""
        if self._known is not None and self.unit != self._known.unit:
            raise ValueError(f"--privacy-unit {self.unit}: the lifetime budget of [dataset.{self._known.id}] in "
                             f"{self.policy.path} is for {self._known.unit}. Leave the option out, or change the "
                             "policy")

    def _check_declared(self, known: DatasetPolicy) -> None:
        """Take the size and the labels that the policy declares; raise ValueError if the command line contradicts."""
        sizes = self.declared_size, known.declared_size
        labels = self.labels and set(self.labels), known.labels and set(known.labels)
        for flag, (given, declared) in {"--declared-size": sizes, "--labels": labels}.items():
            if None not in (given, declared) and given != declared:
                raise ValueError(f"{flag} is not what [dataset.{known.id}] in {self.policy.path} declares. Leave the "
                                 "option out, or change the policy")
        self.declared_size = self.declared_size or known.declared_size
        self.labels = self.labels or known.labels

    def _unlisted(self) -> str:
        """Return the id of data that the policy does not list: their id in the ledger, or else a new one.

        Raises:
            ValueError: the ledger has a lifetime budget for these data, so the policy must have lost its entry.
        """
        place, held = absolute(self._data), self.ledger.datasets()
        before = [name for name, at in held.items() if at == place and name not in self.policy.datasets]
        dataset = before[-1] if before else self.policy.free_id(self._data, self._taken())
        declared = self.ledger.lifetime(dataset).declared
        if declared and not self.ledger.simulated:
            lost = declared[-1]
            entry = DatasetPolicy(dataset, place, lost.epsilon, lost.delta, lost.unit, lost.distinct)
            raise ValueError(f"{self.ledger.path} holds a lifetime budget of ε {lost.epsilon:g} for {dataset!r}, and "
                             f"the policy {self.policy.path} has no entry for {self._data}. Restore the policy, or "
                             f"write the entry again (under another id if these are other data):\n\n{entry.toml()}")
        return dataset

    def _taken(self) -> set[str]:
        """Return the ids under which the ledger holds other data."""
        place = absolute(self._data)
        return {name for name, at in self.ledger.datasets().items() if at not in (None, place)}

    @property
    def listed(self) -> bool:
        """Whether the policy lists the data set."""
        return self._known is not None

    @property
    def about(self) -> About:
        """What the policy states about the data's use, for the privacy report alone."""
        return self._known.about if self._known else NOTHING

    @property
    def unit_column(self) -> str | None:
        """The column that says which unit of privacy a row belongs to; None if each row is a unit."""
        return unit_column(self.unit)

    def check_proposal(self, proposal: Proposal) -> None:
        """Check the proposed plan against the policy. Called before the data play any part.

        Args:
            proposal: what the server proposes.

        Raises:
            Refused: "policy": the policy forbids it; the reason is in the local log.
        """
        try:
            self.policy.check_proposal(proposal, server=self._server)
        except Forbidden as error:
            log.error("%s", error)
            raise Refused("policy") from None

    def check_anchor(self, sealed: bytes | None) -> None:
        """Check that the ledger is not older than the anchor that the server keeps. Called before anything is charged.

        An anchor says how far the ledger had come when the anchor was sent. A ledger that has come less far is an older
        copy, which has forgotten spending.

        Args:
            sealed: the anchor, as in `Proposal.anchor`.

        Raises:
            Refused: "policy": the ledger has come less far; the reason is in the local log.
        """
        if not sealed or self.ledger.simulated:
            return
        try:
            known = self.ledger.check_anchor(sealed)
        except LedgerError as error:
            log.error("%s", error)
            raise Refused("policy") from None
        if not known:
            log.warning("The server keeps an anchor under this client's name that is not of this ledger's key: it is "
                        "another ledger's, or was changed. It is ignored, and replaced with the next upload.")

    def recognise(self, rows: Rows) -> list[str]:
        """Check the data against the declarations, and enter their fingerprints into the ledger.

        Called before a server is called. The fingerprints (keyed hashes of the records) find data sets that share
        records, which share their budget.

        Args:
            rows: the data.

        Returns:
            Lines to show to the owner.

        Raises:
            LedgerError: the ledger contradicts a witness file beside the data, its own or another's.
            ValueError: a row has a label that is not declared.
        """
        if self.labels is not None:
            check_labels(rows, self.labels)
        told: list[str] = []
        if not self.ledger.simulated:
            self.ledger.check_folder(self._beside)
            self._declare()
        self._digests = fingerprints(rows, self.ledger.fingerprint_key(), rows.units)
        self.ledger.register(self.dataset, self._digests, place=absolute(self._data))
        if overlapping := self.ledger.overlapping(self.dataset):
            told.append(f"These data sets share records with {self.dataset}, and what they spent counts here: "
                        f"{', '.join(overlapping)}.")
        if self._known is not None and not self.ledger.simulated:
            lifetime = self.ledger.lifetime(self.dataset)
            assert lifetime.remaining is not None
            told.append(f"Lifetime budget of {self.dataset}: {four_digits(lifetime.remaining, down=True)} of ε "
                        f"{lifetime.epsilon:g} left. To allow more, raise epsilon under [dataset.{self.dataset}] in "
                        f"{self.policy.path}. `fedlora-client budget` shows more.")
        return told

    def take_charge(self, budget: Budget | None) -> list[str]:
        """Make the policy and the witness ready, so that a run can be charged. The first private run writes the policy.

        Args:
            budget: the run's budget; None for a run without privacy.

        Returns:
            Lines to show to the owner.

        Raises:
            LedgerError: the witness cannot be written; no update could leave this machine.
            ValueError: the policy cannot be written or its δ is too large for the declared size, or another process
                has just declared another unit.
        """
        told: list[str] = []
        if self.ledger.simulated:
            return told
        if self._known is None and budget is not None:
            told.append(self._adopt(budget))
        if self._known is not None and budget is not None and self._known.delta >= 1 / budget.declared_size:
            raise ValueError(f"[dataset.{self.dataset}] in {self.policy.path} has delta {self._known.delta:g}, which "
                             f"would allow one of {budget.declared_size:,} declared records to be published in full; "
                             f"lower it below 1 / {budget.declared_size:,}")
        self.ledger.testify(self.dataset)
        return told

    def _declare(self) -> None:
        """Give the ledger the limit (if any) and the witness file, to check now and to write before each release."""
        if self._known is None:
            self.ledger.watch(self.dataset, self._witness())
        else:
            self.ledger.declare(self.dataset, epsilon=self._known.epsilon, delta=self._known.delta,
                                unit=self._known.unit, distinct=self._known.distinct, witness=self._witness())

    def _adopt(self, budget: Budget) -> str:
        """Write the budget of the first private run into the policy as the data set's lifetime budget; say so."""
        self._known = known = self.policy.adopt(
            self._data, epsilon=budget.epsilon, delta=budget.delta, unit=self.unit,
            declared_size=budget.declared_size, taken=self._taken())
        self._check_unit()
        self._check_declared(known)
        self.dataset = known.id
        self._declare()
        self.ledger.register(self.dataset, self._digests, place=absolute(self._data))  # the id may be new
        return (f"{self.policy.path} now gives this data set, as [dataset.{known.id}], a lifetime budget of ε "
                f"{known.epsilon:g} at δ {known.delta:.4g}, over all runs. Edit it to allow more or less.")

    def settle(self, fresh: RunTerms, budget: Budget) -> tuple[RunTerms, Book]:
        """Return the run's terms: the stored ones if the run has begun, else new ones that fit the lifetime budget.

        New terms have the least noise, at least that of `fresh`, with which the run fits the lifetime budget.

        Args:
            fresh: the terms that follow from the run's own budget.
            budget: the run's own budget, which becomes the lifetime budget of a data set without one.

        Returns:
            The terms, and a copy of the ledger's book with the limits that they were checked against.

        Raises:
            BudgetExhausted: no terms fit.
        """
        book = self.ledger.current(self.dataset, fresh.run_id)
        if self._known is None and not self.ledger.simulated:  # `take_charge` will declare this limit
            book.limit(self.dataset, Declaration(0.0, budget.epsilon, budget.delta, FILTER_ORDERS, (), self.unit))
        begun = self.ledger.terms(self.dataset, fresh.run_id)
        terms = begun or with_room(fresh, lambda other: book.admit(self.dataset, other) is not None) or fresh
        admitted(book, self.dataset, terms)
        return terms, book

    def terms_for(self, limits: Limits, budget: Budget, plan: RunPlan) -> tuple[RunTerms, Book]:
        """Return the terms of a run, as `settle` does, after checking them against the policy.

        Args:
            limits: what the options and the policy allow together.
            budget: the run's own budget.
            plan: the plan that the server proposes.

        Raises:
            Forbidden: the policy does not allow the run's noise or its sampling rate.
            BudgetExhausted: the lifetime budget does not allow the run.
        """
        try:
            fresh = private_terms(limits, budget, plan)
        except ValueError as error:
            raise Forbidden(f"{error}, or a higher max-sampling-rate in {self.policy.path}") from None
        terms, book = self.settle(fresh, budget)
        self.approve(terms)
        return terms, book

    def approve(self, terms: RunTerms) -> None:
        """Raise Forbidden if the policy does not allow the run's noise."""
        self.policy.check_terms(terms.noise_multiplier)

    @property
    def _beside(self) -> Path:
        """The folder where the data are, for witness files; the ledger's folder if the data are on a hub."""
        place = Path(absolute(self._data))
        return place if place.is_dir() else place.parent if place.exists() else paths.ledger().parent

    def _witness(self) -> Path:
        return witness_file((self._known and self._known.witness) or self._beside, self.dataset)


def limits_of(options: ClientConfig, gate: PrivacyGate) -> Limits:
    """Return what the command line and the policy allow together."""
    policy = gate.policy
    return Limits.of(options, gate.unit, declared_size=gate.declared_size,
                     max_sampling_rate=policy.max_sampling_rate, announce_size=policy.announce_size,
                     trust=policy.trust, least_members=policy.fewest_members)


def unit_count(rows: Rows) -> int:
    """Count the units of privacy, also those whose rows cannot be trained on."""
    return len(rows) if rows.units is None else len(set(rows.units))
