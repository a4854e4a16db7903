"""The data holder's limits, and the terms of a run that follow from them. Neither depends on a record's content."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.config import LocalConfig
from fedlora.plan import ROW, Refused, RunPlan
from fedlora.privacy import MOST_SAMPLING_RATE, SIGMA_STEP, Budget, RunTerms
from fedlora.privacy.mechanisms import mechanism_named

log = logging.getLogger(__name__)

MOST_EXTRA_NOISE = 10
"""A run gets at most this many times the noise that --epsilon asks for. If the lifetime budget requires more, it counts
as exhausted; to take part nevertheless, give a smaller --epsilon."""


@dataclass(frozen=True)
class Limits:
    """The data holder's limits. No proposal of a server changes them.

    Attributes:
        epsilon: the most ε that one run may spend; infinite turns privacy off.
        delta: δ of a run; None for min(1e-5, 0.1 / n̂), where n̂ is the declared size.
        declared_size: n̂, the public number of units; None for their number rounded down to two significant digits.
        max_clip_norm: a larger clip norm (L2) in the plan is lowered to this.
        unit: the unit of privacy, "row" or "column:NAME".
        rows_per_unit: the most rows of one unit that enter a step.
        max_sampling_rate: a private plan that would sample units with a higher probability is refused.
        announce_size: whether uploads state the noise multiplier and δ, from which n̂ can be computed.
        trust: whose noise a run with secure sums is charged for, as in `fedlora.privacy.Policy`.
        least_members: the fewest members of a roster of secure sums; a plan may demand more.
    """

    epsilon: float
    delta: float | None = None
    declared_size: int | None = None
    max_clip_norm: float = float("inf")
    unit: str = ROW
    rows_per_unit: int = 8
    max_sampling_rate: float = MOST_SAMPLING_RATE
    announce_size: bool = True
    trust: str = "local"
    least_members: int = 0

    @classmethod
    def of(cls, options: LocalConfig, unit: str, **allowed: Any) -> Limits:
        """Make limits from the options of fedlora-client or fedlora-simulate.

        Args:
            options: the options.
            unit: the unit of privacy.
            **allowed: values of other attributes; they override the options.
        """
        return cls(options.epsilon, **{
            "delta": options.delta, "declared_size": options.declared_size,
            "max_clip_norm": options.max_clip_norm or float("inf"), "unit": unit,
            "rows_per_unit": options.rows_per_unit} | allowed)

    @property
    def private(self) -> bool:
        """Whether this client trains under differential privacy."""
        return self.epsilon != float("inf")

    def budget(self, units: int) -> Budget:
        """Return the budget of one run.

        Args:
            units: number of units of privacy in the data; used only where no size is declared.

        Raises:
            ValueError: the values do not make a valid budget, such as a δ that is too large for the declared size.
        """
        return Budget.declare(units, epsilon=self.epsilon, delta=self.delta, declared_size=self.declared_size,
                              max_sampling_rate=self.max_sampling_rate)

    def check(self, run: RunPlan) -> None:
        """Refuse a plan whose privacy contradicts --epsilon or cannot be kept.

        Args:
            run: the plan.

        Raises:
            Refused: "privacy-mismatch": one side trains with privacy and the other without. "policy": the plan has
                dropout, which is not private (the log says why).
        """
        if self.private != run.private:
            servers = "required" if run.private else "off"
            own = "a finite --epsilon" if self.private else "--epsilon inf"  # not how much: that is the owner's alone
            raise Refused("privacy-mismatch", f"the server runs with --privacy {servers} and this client with {own}; "
                                              "change one of the two options")
        if run.private and run.dropout:
            log.error("The plan has dropout %g. A record's mask would depend on the other records of its batch, which "
                      "ε does not cover; refused.", run.dropout)
            raise Refused("policy")


def private_terms(limits: Limits, budget: Budget, run: RunPlan, plan_sha256: str = "",
                  scales: Mapping[str, float] | None = None) -> RunTerms:
    """Return the terms with which a run uses up the budget exactly when it begins all trainings that it may.

    What was spent before the run plays no part.

    Args:
        limits: the data holder's limits.
        budget: ε, δ and the declared size of the run.
        run: the plan.
        plan_sha256: digest of the plan once its labels are fixed; it has no influence on the cost.
        scales: factor for each group of tensors, from the plan; they have no influence on the cost.

    Raises:
        ValueError: the run would sample the units with too high a probability, or no noise keeps the budget.
    """
    clip_norm = min(run.clip_norm, limits.max_clip_norm)
    members = max(run.least_members, limits.least_members) if run.secure_aggregation else 0
    noise = mechanism_named(run.mechanism).calibrate(budget, run, clip_norm,
                                                     members if limits.trust == "aggregate" else None)
    return RunTerms(
        run_id=run.run_id, plan_sha256=plan_sha256, unit=limits.unit, declared_size=budget.declared_size,
        sampling_rate=budget.sampling_rate(run.expected_batch), noise_multiplier=noise.own,
        delta=budget.delta, clip_norm=clip_norm, scales=scales or {},
        local_steps=run.local_steps, max_participations=run.most_trainings, mechanism=run.mechanism,
        aggregate_noise_multiplier=noise.aggregate, least_members=members, colluding=run.colluding)


def with_room(terms: RunTerms, fits: Callable[[RunTerms], bool], most: float = MOST_EXTRA_NOISE) -> RunTerms | None:
    """Return the terms with the least noise that fits; None if none does.

    Args:
        terms: private terms; their noise is the least that is tried. The noise multipliers that are charged are
            multiples of `SIGMA_STEP`.
        fits: whether terms fit the lifetime budget; true for more noise if it is true for less.
        most: the most noise that is tried, as a multiple of that of `terms`.
    """
    if fits(terms):
        return terms
    noise, mechanism = terms.noise, mechanism_named(terms.mechanism)
    assert noise is not None

    def with_noise(multiple: int) -> RunTerms:
        return terms.with_noise(mechanism.raised(noise, multiple * SIGMA_STEP))

    low = high = round(noise.charged / SIGMA_STEP)
    largest = math.floor(most * noise.charged / SIGMA_STEP)
    while not fits(with_noise(high)):
        if high == largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(with_noise(middle)) else (middle, high)
    return with_noise(high)
