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

from fedlora.adapters import AdaptedModel, start_of
from fedlora.adapters.sketches import private_start, sketch_layout, sketch_plan, sketch_tensors
from fedlora.plan import Released, RunPlan, Tensors

from .base import FederatedLoRA
from .recipes.fedavg_lora import RECIPE
from .reductions import FactorReduction, Reduction


class PrivateStart(FederatedLoRA):
    """The strategy of round 0: it combines what the clients release. `begin` makes the run's start from the result.

    Args:
        plan: The run's plan.
        adapted: The model with the adapters of the run's strategy.
        init: The start, one that reads what clients release, as --init has it.
        state: A start that does not depend on data, for the tensors that the releases do not determine.
        seed: The run's seed.
        reduction: Combines the releases, as it does the uploads of the other rounds; None for the weighted mean, which
            also takes the place of one that reads uploads as factors of updates.

    Attributes:
        init: The start.
        tensors: The tensors that round 0 sends.

    Raises:
        ValueError: The start has no bases for a layer's rank.
    """

    recipe = RECIPE
    sends_changes = True

    def __init__(self, plan: RunPlan, adapted: AdaptedModel, init: str, state: Tensors, seed: int,
                 reduction: Reduction | None = None) -> None:
        start, _ = start_of(init)
        for site in adapted.layout.sites:
            start.check_rank(site)
        layout = sketch_layout(plan, adapted.layout, adapted.missing)
        recipe = dataclasses.replace(RECIPE, family=layout.family.name)
        if reduction is not None and not isinstance(reduction, FactorReduction):
            recipe = dataclasses.replace(recipe, reduction=reduction)
        super().__init__(dataclasses.replace(plan, family=recipe.family), layout, recipe=recipe)
        self.plan = plan  # the plan that clients have agreed to, with the run's own family
        self.tensors = sketch_tensors(layout, state, seed)
        self.init, self._run_layout, self._state, self._seed = init, adapted.layout, state, seed

    @property
    @override
    def trained_by(self) -> RunPlan:
        return sketch_plan(self.plan)

    def begin(self, sketches: Released) -> Tensors:
        """Return the state that round 1 starts from.

        Args:
            sketches: The combined releases of the clients.
        """
        return private_start(self.plan, self._run_layout, self.init, self._state, self._seed, sketches)
