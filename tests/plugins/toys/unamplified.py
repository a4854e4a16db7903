"""DP-SGD charged as if every unit entered every step: it holds too against whoever learns which units were drawn."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.plan import RunPlan
from fedlora.privacy.accounting import Budget, calibrate
from fedlora.privacy.mechanisms import Mechanism, Noise
from fedlora.privacy.spend import Spend

SET_ASIDE = 0.1
"""Share of δ that is set aside for what the steps do not count."""


class Unamplified(Mechanism):
    """The Gaussian mechanism without amplification by sampling."""

    promise: ClassVar[str] = (
        "This client adds all of this noise to each upload by itself. The figure holds even against whoever learns "
        "which units entered each step.")
    stores: ClassVar[tuple[str, ...]] = ("mechanism",)

    @override
    def calibrate(self, budget: Budget, run: RunPlan, clip_norm: float, relied: int | None = None) -> Noise:
        delta = (1 - SET_ASIDE) * budget.delta
        return Noise(calibrate(budget.epsilon, delta, 1.0, run.most_trainings * run.local_steps))

    @override
    def steps_delta(self, noise: Noise, delta: float) -> float:
        return (1 - SET_ASIDE) * delta

    @override
    def spends(self, noise: Noise, sampling_rate: float, steps: int) -> tuple[Spend, ...]:
        return (Spend(noise.charged, 1.0, steps),) if steps else ()


MECHANISM = Unamplified
