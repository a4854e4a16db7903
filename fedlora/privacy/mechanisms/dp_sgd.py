"""DP-SGD (Abadi et al., arXiv:1607.00133): each client's own noise protects its upload."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from fedlora.plan import RunPlan
from fedlora.privacy.accounting import Budget
from fedlora.privacy.mechanisms import Mechanism, Noise


class DpSgd(Mechanism):
    """The Poisson-sampled Gaussian mechanism with all of its noise by the client itself."""

    promise: ClassVar[str] = (
        "This client adds all of this noise to each upload by itself. The figure holds against everyone who sees what "
        "leaves this client, the server included, and nobody has to be trusted for it.")

    @override
    def calibrate(self, budget: Budget, run: RunPlan, clip_norm: float, relied: int | None = None) -> Noise:
        return Noise(budget.noise_multiplier(run.expected_batch, run.most_trainings * run.local_steps))


MECHANISM = DpSgd
