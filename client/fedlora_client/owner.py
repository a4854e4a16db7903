"""The data owner's side of a client process: the policy that is asked first, and the ledger that is charged."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from fedlora.data import Rows
from fedlora.plan import ROW, Refused, unit_column
from fedlora.privacy import Budget, Forbidden, Ledger, Policy, RunTerms
from fedlora.privacy.ledger.fingerprints import fingerprints
from fedlora.privacy.policy import absolute
from fedlora.wire import Setup

from . import places
from .session import Limits

log = logging.getLogger(__name__)


class Owner:
    """What the owner of --data allows and has spent.

    Args:
        options: of fedlora-client.
    Raises:
        ValueError: the policy or the ledger cannot be trusted, or contradicts the command line.

    Attributes:
        policy, ledger: opened before a server is called.
        unit: of privacy, by the command line and the policy.
        dataset: the id that is charged; known before the data is read.
    """

    def __init__(self, options: Namespace) -> None:
        folder: Path | None = options.simulated_ledger
        self.policy = Policy.read(options.policy or (folder / "policy.toml" if folder else places.policy()))
        self._known = self.policy.dataset_at(options.data)
        self._data, self._server = str(options.data), options.server
        private = options.epsilon != float("inf")
        if self._known is not None and not private:
            raise ValueError(f"--epsilon inf: the policy {self.policy.path} gives {options.data} a lifetime budget "
                             f"([dataset.{self._known.id}]), and a run without privacy would break it. Take the table "
                             "out of the policy if you want that")
        declared = self._known.unit if self._known else ROW
        self.unit: str = options.privacy_unit or declared
        if self._known is not None and self.unit != declared:
            raise ValueError(f"--privacy-unit {self.unit}: the lifetime budget of [dataset.{self._known.id}] in "
                             f"{self.policy.path} is for {declared}. Leave the flag out, or change the policy")
        self.dataset = self._known.id if self._known else self.policy.free_id(self._data)
        self.ledger = Ledger(folder / "ledger.sqlite" if folder else places.ledger(), simulated=folder is not None,
                             new=options.new_ledger)

    @property
    def unit_column(self) -> str | None:
        """The column that tells the units, or None where each row is one."""
        return unit_column(self.unit)

    def check_proposal(self, setup: Setup) -> None:
        """Before the data is read.

        Raises:
            Refused: "policy"; the reason is in the local log.
        """
        try:
            self.policy.check_proposal(strategy=setup.strategy, model_sha256=setup.model.weights_sha256,
                                       server=self._server,
                                       rounds=setup.max_participations + setup.private_start,
                                       announces_labels=setup.announce_labels, private_start=setup.private_start)
        except Forbidden as error:
            log.error("%s", error)
            raise Refused("policy") from None

    def take_charge(self, rows: Rows, budget: Budget | None) -> list[str]:
        """Tell the ledger whose data this is. The first private use writes the policy.

        Args:
            budget: of the run; None without privacy.
        Returns:
            What the owner should hear.
        Raises:
            LedgerError: the ledger does not fit its witness beside the data.
        """
        told: list[str] = []
        if not self.ledger.simulated:
            if self._known is None and budget is not None:
                self._known = self.policy.adopt(self._data, epsilon=budget.epsilon, delta=budget.delta, unit=self.unit)
                self.dataset = self._known.id
                told.append(f"{self.policy.path} now gives this data set, as [dataset.{self.dataset}], a lifetime "
                            f"budget of ε {budget.epsilon:g} at δ {budget.delta:g}, over all runs. Edit it to allow "
                            "more or less.")
            if self._known is not None:
                self.ledger.declare(self.dataset, epsilon=self._known.epsilon, delta=self._known.delta,
                                    unit=self._known.unit, distinct=self._known.distinct, witness=self._witness())
        self.ledger.register(self.dataset, fingerprints(rows, self.ledger.fingerprint_key(), rows.units))
        if overlapping := self.ledger.overlapping(self.dataset):
            told.append(f"These data sets share records with {self.dataset}, and what they spent counts here: "
                        f"{', '.join(overlapping)}.")
        if self._known is not None and not self.ledger.simulated:
            lifetime = self.ledger.lifetime(self.dataset)
            told.append(f"Lifetime budget of {self.dataset}: ε {lifetime.spent:.2f} of {lifetime.epsilon:g} spent. "
                        "`fedlora-client budget` shows more.")
        return told

    def approve(self, terms: RunTerms) -> None:
        """Raises Forbidden where the policy does not allow the run's terms."""
        self.policy.check_terms(sampling_rate=terms.sampling_rate, noise_multiplier=terms.noise_multiplier)

    def _witness(self) -> Path:
        assert self._known is not None
        place = Path(absolute(self._data))
        beside = place if place.is_dir() else place.parent if place.exists() else places.ledger().parent
        return (self._known.witness or beside) / f".fedlora-witness-{self.dataset}.json"


def limits_of(options: Namespace, owner: Owner) -> Limits:
    """What the command line and the policy allow together."""
    return Limits.of(options, owner.unit, announce_size=owner.policy.announce_size)


def unit_count(rows: Rows) -> int:
    """Units of privacy among the rows that have a label, or among all rows where labels are not needed."""
    kept = [row for row in range(len(rows)) if rows.labels is None or rows.labels[row] is not None]
    return len(kept) if rows.units is None else len({rows.units[i] for i in kept})
