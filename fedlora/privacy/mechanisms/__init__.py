"""Privacy mechanisms: each file of this folder is one, found by its name, which a run's plan gives as `mechanism`.

A mechanism says how much noise the terms of a run need, what a number of steps cost, and what the noise promises. The
ledger charges what it says, and the privacy report states it. Unit and relation are those of
`fedlora.privacy.accounting`: one unit of one client, zero-out.

A mechanism says how much noise a client adds (`Noise.own`), not how it is drawn. The noise is Gaussian: the ledger
charges for that, and the runtime check measures it. `fedlora.training` draws it, and rounds it in a secure sum.

A file defines `MECHANISM`, a class that derives from `Mechanism`. The first line of the file's docstring is its title.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from fedlora import registry
from fedlora.plan import RunPlan
from fedlora.privacy.accounting import Budget
from fedlora.privacy.spend import Spend

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

PACKAGE = "fedlora.privacy.mechanisms"


@dataclass(frozen=True)
class Noise:
    """The noise multipliers of one client in one run: standard deviations, as multiples of the clip norm.

    Attributes:
        own: of the noise that the client adds to its own upload.
        aggregate: of the noise that other members' shares make of it in each sum, if that is what the owner's policy
            charges; None if the client's own noise is charged, which needs no trust in anybody.
    """

    own: float
    aggregate: float | None = None

    @property
    def charged(self) -> float:
        """The noise multiplier for which the ledger charges steps."""
        return self.own if self.aggregate is None else self.aggregate


class Mechanism(ABC):
    """One privacy mechanism. It has no state.

    Attributes:
        promise: in two sentences, what the noise promises and what that assumes.
        stores: the fields of `fedlora.privacy.RunTerms` that are stored for this mechanism, but not for every one.
            "mechanism" is among them for all but dp-sgd, as which a run without that field is read.
    """

    promise: ClassVar[str]
    stores: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def calibrate(self, budget: Budget, run: RunPlan, clip_norm: float, relied: int | None = None) -> Noise:
        """Return the least noise with which a run stays within a budget if all of its trainings are begun.

        Args:
            budget: ε, δ and the declared size.
            run: the run's plan.
            clip_norm: the client's own clip norm, at most the plan's.
            relied: the fewest members whose shares of the noise the client's owner relies on; None to rely on nobody.

        Raises:
            ValueError: the run would sample the units with too high a probability, or no noise keeps the budget.
        """

    def raised(self, noise: Noise, charged: float) -> Noise:
        """Return the noise whose charged multiplier is another, larger one."""
        return Noise(charged)

    def steps_delta(self, noise: Noise, delta: float) -> float:
        """Return the part of a δ that is left for the steps. The rest is set aside for what steps do not count."""
        return delta

    def spends(self, noise: Noise, sampling_rate: float, steps: int) -> tuple[Spend, ...]:
        """Return what a number of steps cost, as the ledger charges it."""
        return (Spend(noise.charged, sampling_rate, steps),) if steps else ()

    def event(self, noise: Noise, sampling_rate: float, steps: int) -> DpEvent:
        """Return what a number of steps cost in dp-accounting's terms, for any accountant that takes its events."""
        from dp_accounting import dp_event  # imports much that reading a ledger does not need

        return dp_event.ComposedDpEvent([
            dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(
                spend.sampling_rate, dp_event.GaussianDpEvent(spend.noise_multiplier)), spend.steps)
            for spend in self.spends(noise, sampling_rate, steps)])


@cache
def mechanism_named(key: str) -> Mechanism:
    """Return the installed mechanism of a key.

    Raises:
        ValueError: there is none of this key.
    """
    made: Mechanism = registry.load(PACKAGE, key).MECHANISM()
    return made


@cache
def stored_fields() -> frozenset[str]:
    """Return the fields of `fedlora.privacy.RunTerms` that are stored for some installed mechanisms alone."""
    return frozenset(field for key in registry.keys(PACKAGE) for field in mechanism_named(key).stores)
