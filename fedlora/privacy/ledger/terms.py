"""The privacy terms of one run, as the ledger stores them, and what a number of trainings under them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedlora.plan.limits import AGGREGATE, LOCAL
from fedlora.privacy.accounting import Accountant
from fedlora.privacy.ledger.rosters import RosterFacts
from fedlora.privacy.mechanisms import Noise, mechanism_named, stored_fields
from fedlora.privacy.mechanisms.distributed_gaussian import foretold_epsilon
from fedlora.privacy.spend import Spend


@dataclass(frozen=True)
class RunTerms:
    """The privacy terms of one run, fixed while it lasts.

    Attributes:
        run_id: the run.
        plan_sha256: digest of the run's plan.
        unit: the unit that the run protects: "row" or "column:NAME".
        declared_size: public nominal number of units.
        sampling_rate: probability with which each unit enters a step.
        noise_multiplier: noise standard deviation / clip_norm; None if privacy is off, which costs an infinite epsilon.
        delta: the delta of the run's own guarantee; None if privacy is off.
        clip_norm: L2 bound on one unit's scaled gradient.
        scales: group of tensors → data-independent factor on its gradients before clipping.
        local_steps: steps of one training.
        max_participations: the most trainings that this run may begin.
        relation: the relation of neighbouring data sets for which the noise was computed.
        accountant: the accountant with which the noise was computed.
        mechanism: key of the privacy mechanism (`fedlora.privacy.mechanisms`).
        aggregate_noise_multiplier: the least noise of the run's sums by honest members, over this client's sensitivity,
            if the owner's policy charges the sums; None if this client's own noise is charged.
        least_members: the fewest members of a roster of secure sums that this client takes part in; 0 without them.
        colluding: t, how many members may tell the server what they know without the sums' promise changing.

    Raises:
        ValueError: a value is out of range; the message names it.
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
    mechanism: str = LOCAL
    aggregate_noise_multiplier: float | None = None
    least_members: int = 0
    colluding: int = 0

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
        if self.aggregate_noise_multiplier is not None:
            if self.noise_multiplier is None or self.mechanism != AGGREGATE:
                raise ValueError("aggregate_noise_multiplier is set, and only a private run with secure sums has one")
            Spend(self.aggregate_noise_multiplier, self.sampling_rate, 1)

    @property
    def charged(self) -> str:
        """Whose noise the budget is charged for, in the word that policy.toml has for it: "local" or "aggregate"."""
        return "local" if self.aggregate_noise_multiplier is None else "aggregate"

    @property
    def noise(self) -> Noise | None:
        """The noise of the run; None if privacy is off."""
        if self.noise_multiplier is None:
            return None
        return Noise(self.noise_multiplier, self.aggregate_noise_multiplier)

    def with_noise(self, noise: Noise) -> RunTerms:
        """Return the same terms with other noise."""
        return replace(self, noise_multiplier=noise.own, aggregate_noise_multiplier=noise.aggregate)

    def own(self) -> RunTerms:
        """Return the terms by which this client's own noise is charged, whatever the owner's policy relies on."""
        return replace(self, aggregate_noise_multiplier=None)

    def stored(self) -> dict[str, Any]:
        """Return the fields that the ledger stores, by name. Those of other mechanisms alone are left out."""
        others = stored_fields() - set(mechanism_named(self.mechanism).stores)
        return {name: value for name, value in asdict(self).items() if name not in others}

    def lacks(self, roster: RosterFacts) -> str:
        """Return what the sums of a roster lack to keep what this run is charged for; "" if nothing."""
        least = self.aggregate_noise_multiplier
        if least is None:
            return ""
        if not roster.pinned:
            return "the policy does not name the keys of the roster's members"
        if roster.members < self.least_members:
            return f"the roster has {roster.members} members, and the charge relies on {self.least_members}"
        if roster.noise_multiplier < least:
            return (f"the roster's honest members add noise of {roster.noise_multiplier:.4g} to a sum, and the charge "
                    f"is for {least:.4g}")
        assert self.delta is not None, "private terms have a delta"
        try:
            roster.noise(self.sampling_rate).epsilon(self.delta, self.max_participations)
        except ValueError as error:
            return str(error)
        return ""

    def spends(self, participations: int) -> tuple[Spend, ...] | None:
        """Return the steps of a number of trainings; None if privacy is off, so that their cost is infinite."""
        if not participations:
            return ()
        if self.noise is None:
            return None
        return mechanism_named(self.mechanism).spends(self.noise, self.sampling_rate, participations * self.local_steps)

    def sums_epsilon(self, participations: int) -> float | None:
        """Return the epsilon towards whoever sees the sums alone, as it can be foretold before a roster is known.

        It is that of a roster of the fewest members, all of whom add as much noise as this client, or that of the noise
        that this client demands of a roster.

        Args:
            participations: the number of trainings.

        Returns:
            None without secure sums or without privacy.
        """
        if self.mechanism != AGGREGATE or self.noise_multiplier is None:
            return None
        if self.aggregate_noise_multiplier is not None:
            return self.epsilon(participations)
        assert self.delta is not None, "a run with noise has a delta"
        return foretold_epsilon(self.noise_multiplier, self.sampling_rate, participations * self.local_steps,
                                self.delta, members=self.least_members, colluding=self.colluding)

    def steps_delta(self, delta: float) -> float:
        """Return the part of a delta that is left for the steps of this run's mechanism."""
        return delta if self.noise is None else mechanism_named(self.mechanism).steps_delta(self.noise, delta)

    def epsilon(self, participations: int, delta: float | None = None) -> float:
        """Return an upper bound on the epsilon of a number of trainings alone; infinite if privacy is off.

        Args:
            participations: the number of trainings.
            delta: default the run's own.
        """
        spends, at = self.spends(participations), self.delta if delta is None else delta
        if spends is None or not spends:
            return math.inf if spends is None else 0.0
        assert at is not None, "a run with noise has a delta"
        return Accountant(spends).epsilon(self.steps_delta(at))
