"""The round before the first: clients release noised sketches of their gradients, from which the adapters start.

    server        sends Q and P, fixed and random
    client k      releases Z_k ≈ Qᵀ G_k and Y_k ≈ G_k Pᵀ, clipped, noised, and charged as one participation
    server        A ← right singular vectors of Σ p_k Z_k; where B is fixed, B ← left ones of Σ p_k Y_k

See `fedlora.adapters.sketches`. Whatever the run's strategy, the release has the factors of plain LoRA.
"""

from __future__ import annotations

import dataclasses

from fedlora.adapters import AdaptedModel
from fedlora.adapters.sketches import private_start, sketch_layout, sketch_plan, sketch_tensors
from fedlora.plan import Released, RunPlan, Tensors

from .base import FederatedLoRA
from .recipes.fedavg_lora import RECIPE


class PrivateStart(FederatedLoRA):
    """Average the sketches. `begin` makes the run's start of their mean.

    Args:
        plan: the run's.
        adapted: as the run's strategy needs it.
        state: a start that does not depend on data, taken where the sketches decide nothing.
        seed: of Q and P.

    Attributes:
        tensors: what round 0 sends.
    """

    recipe = RECIPE
    sends_changes = True

    def __init__(self, plan: RunPlan, adapted: AdaptedModel, state: Tensors, seed: int) -> None:
        layout = sketch_layout(adapted.layout, adapted.missing)
        super().__init__(dataclasses.replace(plan, family=RECIPE.family), layout)
        self.plan = plan  # what clients have agreed to
        self.tensors = sketch_tensors(layout, state, seed)
        self._run_layout, self._state = adapted.layout, state

    @property
    def trained_by(self) -> RunPlan:
        return sketch_plan(self.plan)

    def begin(self, sketches: Released) -> Tensors:
        """The state that round 1 starts from."""
        return private_start(self._run_layout, self._state, sketches)
