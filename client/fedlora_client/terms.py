"""What the data holder allows, and the terms of a run that follow from it: all of them public, before a record is read.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.config import LocalConfig
from fedlora.plan import ROW, Refused, RunPlan
from fedlora.privacy import MOST_SAMPLING_RATE, SIGMA_STEP, Budget, RunTerms

log = logging.getLogger(__name__)

MOST_EXTRA_NOISE = 10
"""Where the lifetime budget leaves room only for more than so many times the noise of --epsilon, it is exhausted: who
wants such a run asks for less epsilon."""


@dataclass(frozen=True)
class Limits:
    """What the data holder allows, whatever a server proposes.

    Attributes:
        epsilon: most that one run may spend; infinite turns privacy off.
        delta: None for min(1e-5, 0.1 / n̂).
        declared_size: the public n̂; None for the number of units, rounded down to two significant digits.
        max_clip_norm: the plan's clip norm is lowered to at most this.
        unit: "row", or "column:NAME".
        rows_per_unit: most rows of one unit that enter a step.
        max_sampling_rate: a private plan that would sample more often is refused.
        announce_size: whether uploads state sigma and delta, which tell n̂.
    """

    epsilon: float
    delta: float | None = None
    declared_size: int | None = None
    max_clip_norm: float = float("inf")
    unit: str = ROW
    rows_per_unit: int = 8
    max_sampling_rate: float = MOST_SAMPLING_RATE
    announce_size: bool = True

    @classmethod
    def of(cls, options: LocalConfig, unit: str, **allowed: Any) -> Limits:
        """The options of fedlora-client or fedlora-simulate as limits, and other attributes, which win over them."""
        return cls(options.epsilon, **{
            "delta": options.delta, "declared_size": options.declared_size,
            "max_clip_norm": options.max_clip_norm or float("inf"), "unit": unit,
            "rows_per_unit": options.rows_per_unit} | allowed)

    @property
    def private(self) -> bool:
        return self.epsilon != float("inf")

    def budget(self, units: int) -> Budget:
        """Of one run on so many units of privacy. Raises ValueError where there can be none."""
        return Budget.declare(units, epsilon=self.epsilon, delta=self.delta, declared_size=self.declared_size,
                              max_sampling_rate=self.max_sampling_rate)

    def check(self, run: RunPlan) -> None:
        """Refuse a plan whose privacy contradicts --epsilon, or cannot be kept; the log says why."""
        if self.private != run.private:
            servers = "required" if run.private else "off"
            raise Refused("privacy-mismatch", f"the server runs with --privacy {servers} and this client with "
                                              f"--epsilon {self.epsilon:g}; change one of the two flags")
        if run.private and run.dropout:
            log.error("The plan has dropout %g: a record's mask depends on the others in its batch, so that ε would "
                      "not cover it; refused.", run.dropout)
            raise Refused("policy")


def private_terms(limits: Limits, budget: Budget, run: RunPlan, plan_sha256: str = "",
                  scales: Mapping[str, float] | None = None) -> RunTerms:
    """The terms on which a run uses this budget up exactly at its most participations, whatever was spent before.

    Args:
        plan_sha256, scales: of the plan, once its labels are fixed; what the run costs does not depend on them.

    Raises:
        ValueError: the run would sample the units too often, or the budget cannot be kept.
    """
    return RunTerms(
        run_id=run.run_id, plan_sha256=plan_sha256, unit=limits.unit, declared_size=budget.declared_size,
        sampling_rate=budget.sampling_rate(run.expected_batch),
        noise_multiplier=budget.noise_multiplier(run.expected_batch, run.most_trainings * run.local_steps),
        delta=budget.delta, clip_norm=min(run.clip_norm, limits.max_clip_norm), scales=scales or {},
        local_steps=run.local_steps, max_participations=run.most_trainings)


def with_room(terms: RunTerms, fits: Callable[[RunTerms], bool], most: float = MOST_EXTRA_NOISE) -> RunTerms | None:
    """The terms with the smallest noise, from theirs to `most` times as much, that fit; None where none do."""
    def with_noise(multiple: int) -> RunTerms:
        return dataclasses.replace(terms, noise_multiplier=multiple * SIGMA_STEP)

    if fits(terms):
        return terms
    assert terms.noise_multiplier is not None
    low = high = round(terms.noise_multiplier / SIGMA_STEP)
    largest = math.floor(most * terms.noise_multiplier / SIGMA_STEP)
    while not fits(with_noise(high)):
        if high == largest:
            return None
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(with_noise(middle)) else (middle, high)
    return with_noise(high)
