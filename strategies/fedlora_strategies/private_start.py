"""The start from the clients' gradients: a round 0 in which they release sketches of them, noised in a private run.

    server        sends Q and P, fixed and random
    client k      releases Z_k ≈ Qᵀ G_k and Y_k ≈ G_k Pᵀ, clipped, noised, and charged as one participation
    server        A ← right singular vectors of Σ p_k Z_k; where B is fixed, B ← left ones of Σ p_k Y_k

`fedlora.adapters.sketches` explains the method. Round 0 uses the factors of plain LoRA, whatever the run's strategy, or
for whole gradients matrices of the weights' own shapes.
"""

from __future__ import annotations

import dataclasses

from typing_extensions import override

from fedlora.adapters import AdaptedModel
from fedlora.adapters.sketches import private_start, sketch_layout, sketch_plan, sketch_tensors
from fedlora.adapters.start import Start
from fedlora.plan import Released, RunPlan, Tensors

from .base import FederatedLoRA
from .recipes.fedavg_lora import RECIPE
from .reductions import FactorReduction, Reduction


class PrivateStart(FederatedLoRA):
    """The strategy of round 0: it combines the clients' sketches. `begin` makes the run's start from the result.

    Args:
        plan: The run's plan.
        adapted: The model with the adapters of the run's strategy.
        start: The start, one that reads what clients release.
        state: A start that does not depend on data, for the tensors that the sketches do not determine.
        seed: The seed of Q and P.
        reduction: Combines the sketches, as it does the uploads of the other rounds; None for the weighted mean, which
            also takes the place of one that reads uploads as factors of updates.

    Attributes:
        tensors: The tensors that round 0 sends.

    Raises:
        ValueError: The start has no bases for a layer's rank.
    """

    recipe = RECIPE
    sends_changes = True

    def __init__(self, plan: RunPlan, adapted: AdaptedModel, start: Start, state: Tensors, seed: int,
                 reduction: Reduction | None = None) -> None:
        for site in adapted.layout.sites:
            start.check_rank(site)
        layout = sketch_layout(plan, adapted.layout, adapted.missing)
        recipe = dataclasses.replace(RECIPE, family=layout.family.name)
        if reduction is not None and not isinstance(reduction, FactorReduction):
            recipe = dataclasses.replace(recipe, reduction=reduction)
        super().__init__(dataclasses.replace(plan, family=recipe.family), layout, recipe=recipe)
        self.plan = plan  # the plan that clients have agreed to, with the run's own family
        self.tensors = sketch_tensors(layout, state, seed)
        self._start, self._run_layout, self._state = start, adapted.layout, state

    @property
    @override
    def trained_by(self) -> RunPlan:
        return sketch_plan(self.plan)

    def begin(self, sketches: Released) -> Tensors:
        """Return the state that round 1 starts from.

        Args:
            sketches: The combined sketches of the clients.
        """
        return private_start(self._run_layout, self._start, self._state, sketches)
