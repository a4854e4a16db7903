"""The data owner's side of a client process: the policy that is asked first, and the ledger that is charged."""

from __future__ import annotations

import logging
from pathlib import Path

from fedlora.config import ClientConfig
from fedlora.data import Rows, check_labels
from fedlora.plan import ROW, Proposal, Refused, unit_column
from fedlora.privacy import Budget, DatasetPolicy, Forbidden, Ledger, Policy, RunTerms, four_digits
from fedlora.privacy.ledger import LedgerError
from fedlora.privacy.ledger.fingerprints import fingerprints
from fedlora.privacy.ledger.ledger import admitted
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS, Book, Declaration
from fedlora.privacy.ledger.witness import witness_file, witnesses_in
from fedlora.privacy.policy import absolute, check_label_names

from . import paths
from .terms import Limits, with_room

log = logging.getLogger(__name__)


class PrivacyGate:
    """What the owner of --data allows and has spent.

    Args:
        options: of fedlora-client.

    Raises:
        ValueError: the policy or the ledger cannot be trusted, or contradicts the command line.

    Attributes:
        policy, ledger: opened before a server is called.
        unit: of privacy, by the command line and the policy.
        declared_size: the public number of units, by the command line and the policy; None where neither names one.
        labels: the names that may be told to a server, likewise.
        dataset: the id that is charged; known before the data is read.
    """

    def __init__(self, options: ClientConfig) -> None:
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
                             new=options.new_ledger)
        self.dataset = self._known.id if self._known else self._unlisted()

    def _check_made_up(self, options: ClientConfig) -> None:
        """Raises ValueError where a simulated ledger would hide what is spent of real data."""
        where = f"--simulated-ledger {options.simulated_ledger}: "
        for path in {options.policy or paths.policy(), paths.policy()}:
            if real := Policy.read(path).dataset_around(self._data):
                raise ValueError(f"{where}[dataset.{real.id}] in {path} gives {real.data} a lifetime budget, and a "
                                 "simulated ledger would not charge it. Leave the option out")
        if Path(self._data).exists() and (left := witnesses_in(self._beside)):
            raise ValueError(f"{where}{left[0]} says that a real ledger is kept for these data, and a simulated one "
                             "would not charge it. Leave the option out, or put made-up data in a folder of its own")

    def _check_unit(self) -> None:
        """Raises ValueError where the run would protect another unit than the lifetime budget."""
        if self._known is not None and self.unit != self._known.unit:
            raise ValueError(f"--privacy-unit {self.unit}: the lifetime budget of [dataset.{self._known.id}] in "
                             f"{self.policy.path} is for {self._known.unit}. Leave the flag out, or change the policy")

    def _check_declared(self, known: DatasetPolicy) -> None:
        """Take what the policy declares. Raises ValueError where the command line says otherwise."""
        sizes = self.declared_size, known.declared_size
        labels = self.labels and set(self.labels), known.labels and set(known.labels)
        for flag, (given, declared) in {"--declared-size": sizes, "--labels": labels}.items():
            if None not in (given, declared) and given != declared:
                raise ValueError(f"{flag} is not what [dataset.{known.id}] in {self.policy.path} declares. Leave the "
                                 "flag out, or change the policy")
        self.declared_size = self.declared_size or known.declared_size
        self.labels = self.labels or known.labels

    def _unlisted(self) -> str:
        """The id of data that the policy does not name: the one they had before, or one that no other data have.

        Raises:
            ValueError: the ledger holds a limit for them, so that the policy has lost it.
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
        """Ids under which the ledger holds other data."""
        place = absolute(self._data)
        return {name for name, at in self.ledger.datasets().items() if at not in (None, place)}

    @property
    def listed(self) -> bool:
        """Whether the policy names the data set."""
        return self._known is not None

    @property
    def unit_column(self) -> str | None:
        """The column that tells the units, or None where each row is one."""
        return unit_column(self.unit)

    def check_proposal(self, proposal: Proposal) -> None:
        """Before anything is made of the data.

        Raises:
            Refused: "policy"; the reason is in the local log.
        """
        try:
            self.policy.check_proposal(proposal, server=self._server)
        except Forbidden as error:
            log.error("%s", error)
            raise Refused("policy") from None

    def check_anchor(self, sealed: bytes | None) -> None:
        """Before anything is charged, hold the ledger against what the server keeps of it.

        Args:
            sealed: as `Proposal.anchor`.

        Raises:
            Refused: "policy"; the reason is in the local log.
        """
        if not sealed or self.ledger.simulated:
            return
        try:
            known = self.ledger.check_anchor(sealed)
        except LedgerError as error:
            log.error("%s", error)
            raise Refused("policy") from None
        if not known:
            log.warning("The server keeps an anchor under this client's name that is not of this ledger's key: another "
                        "ledger's, or changed. It is ignored, and replaced with the next upload.")

    def recognise(self, rows: Rows) -> list[str]:
        """Check the data against what is declared, and tell the ledger whose they are: before a server is called.

        Returns:
            What the owner should hear.

        Raises:
            LedgerError: the ledger does not fit its witness, or another one beside the data.
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
        """Be ready to charge a run, whatever comes of it. The first private use writes the policy.

        Args:
            budget: of the run; None without privacy.

        Returns:
            What the owner should hear.

        Raises:
            LedgerError: the witness cannot be written, so that nothing could leave.
            ValueError: the policy cannot be written, or another process has just declared another unit.
        """
        told: list[str] = []
        if self.ledger.simulated:
            return told
        if self._known is None and budget is not None:
            told.append(self._adopt(budget))
        if self._known is not None and budget is not None and self._known.delta >= 1 / budget.declared_size:
            raise ValueError(f"[dataset.{self.dataset}] in {self.policy.path} has delta {self._known.delta:g}, and "
                             f"with {budget.declared_size:,} declared records publishing one of them in full would "
                             "satisfy it; lower it below one in so many")
        self.ledger.testify(self.dataset)
        return told

    def _declare(self) -> None:
        """Have the ledger keep the policy's limit, and watch the witness."""
        if self._known is None:
            self.ledger.watch(self.dataset, self._witness())
        else:
            self.ledger.declare(self.dataset, epsilon=self._known.epsilon, delta=self._known.delta,
                                unit=self._known.unit, distinct=self._known.distinct, witness=self._witness())

    def _adopt(self, budget: Budget) -> str:
        """Give the data set the budget of its first private run for life; says so."""
        self._known = known = self.policy.adopt(
            self._data, epsilon=budget.epsilon, delta=budget.delta, unit=self.unit,
            declared_size=budget.declared_size, taken=self._taken())
        self._check_unit()
        self._check_declared(known)
        self.dataset = known.id
        self._declare()
        self.ledger.register(self.dataset, self._digests, place=absolute(self._data))  # known, but to another id
        return (f"{self.policy.path} now gives this data set, as [dataset.{known.id}], a lifetime budget of ε "
                f"{known.epsilon:g} at δ {known.delta:g}, over all runs. Edit it to allow more or less.")

    def settle(self, fresh: RunTerms, budget: Budget) -> tuple[RunTerms, Book]:
        """The terms of a run: those it was begun with, or new ones whose noise fits the lifetime too.

        Args:
            fresh: as the run's own budget gives them.

        Returns:
            The terms, and a copy of the ledger's book under the limits that they were held against.

        Raises:
            BudgetExhausted: no terms fit.
        """
        book = self.ledger.current(self.dataset, fresh.run_id)
        if self._known is None and not self.ledger.simulated:  # to be adopted
            book.limit(self.dataset, Declaration(0.0, budget.epsilon, budget.delta, FILTER_ORDERS, (), self.unit))
        begun = self.ledger.terms(self.dataset, fresh.run_id)
        terms = begun or with_room(fresh, lambda other: book.admit(self.dataset, other) is not None) or fresh
        admitted(book, self.dataset, terms)
        return terms, book

    def approve(self, terms: RunTerms) -> None:
        """Raises Forbidden where the policy does not allow the run's terms."""
        self.policy.check_terms(terms.noise_multiplier)

    @property
    def _beside(self) -> Path:
        """The folder of the data; of the ledger where the data are on a hub."""
        place = Path(absolute(self._data))
        return place if place.is_dir() else place.parent if place.exists() else paths.ledger().parent

    def _witness(self) -> Path:
        return witness_file((self._known and self._known.witness) or self._beside, self.dataset)


def limits_of(options: ClientConfig, gate: PrivacyGate) -> Limits:
    """What the command line and the policy allow together."""
    policy = gate.policy
    return Limits.of(options, gate.unit, declared_size=gate.declared_size,
                     max_sampling_rate=policy.max_sampling_rate, announce_size=policy.announce_size)


def unit_count(rows: Rows) -> int:
    """All units of privacy, those too whose rows cannot be trained on."""
    return len(rows) if rows.units is None else len(set(rows.units))
