"""The mean of A and of B, and in the stack what the product of the two means lacks: FedEx-LoRA's average.

    B̄ ← Σ p_k B_k,   Ā ← Σ p_k A_k
    D C ← D C + Σ p_k (B_k − B̄)(A_k − Ā)          which is Σ p_k B_k A_k − B̄ Ā

So B̄ Ā + D C is the mean of the uploads' B_k A_k + D C. The residual has a rank of at most (K − 1) r with K uploads, and
those of later rounds add up in the stack. If the stack has too few slots, it keeps the best approximation of all of it,
by a thin SVD; the server tells the lost share in each such round. The m × n product is never formed.

The server must see each upload by itself, so it cannot work with secure aggregation. It withstands no hostile client.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.algebra import Factors, truncated, weighted_mean
from fedlora.plan import Tensors

from ..stack import check_stack, fold, tell
from . import Collected, FactorReduction

SLOTS = 64
"""Slots of a layer's stack, unless --family-options names another number."""

ROUNDING = 1e-7
"""A direction of the residual that is this much weaker than the strongest one is rounding, and takes no slot."""


@dataclass(frozen=True)
class Residual(FactorReduction):
    """The reduction of FedEx-LoRA. The plan's `weight_by_examples` decides about the weights, as for the mean."""

    linear: ClassVar[bool] = False
    refreshes_frozen: ClassVar[bool] = True
    takes_ranks: ClassVar[bool] = False

    def slots(self, rank: int, rounds: int) -> int:
        """Return how many slots a layer's stack gets, as for `fedlora_strategies.stack.Stacking`."""
        return SLOTS

    @override
    def check(self, layout: AdapterLayout) -> None:
        check_stack(layout, "the reduction of fedex-lora")

    @override
    def averages_updates(self, layout: AdapterLayout) -> bool:
        shapes = {spec.name: spec.shape for spec in layout.frozen}
        return all(shapes[f"{site.name}.C"][0] == min(site.d_out, site.d_in) for site in layout.sites)

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(lambda uploads, weights: self._combined(uploads, weights, sent))

    def _combined(self, uploads: Sequence[Tensors], weights: Sequence[float], sent: Tensors) -> Tensors:
        result, stacks = weighted_mean(uploads, weights), []
        for site in [name[:-2] for name in result if name.endswith(".B") and f"{name[:-2]}.A" in result]:
            rest = _residual(uploads, weights, result, site)
            if len(rest.A):
                folded = fold(sent, site, rest.B.numpy(), rest.A.numpy())
                result |= folded.stack
                stacks.append(folded)
        tell(stacks)
        return result


def _residual(uploads: Sequence[Tensors], weights: Sequence[float], mean: Tensors, site: str) -> Factors:
    """Return the factors of Σ p_k (B_k − B̄)(A_k − Ā), float64, of as many columns and rows as its rank."""
    B, A = (np.stack([upload[f"{site}.{factor}"] for upload in uploads], dtype=np.float64) - mean[f"{site}.{factor}"]
            for factor in "BA")
    share = np.array(weights)[:, None, None] / sum(weights)
    columns, rows = np.concatenate(list(B * share), axis=1), np.concatenate(list(A))
    best, _ = truncated(Factors(torch.from_numpy(columns), torch.from_numpy(rows)), min(*columns.shape, rows.shape[1]))
    strengths = best.B.norm(dim=0)
    rank = int((strengths > ROUNDING * strengths.max()).sum())
    return Factors(best.B[:, :rank], best.A[:rank])
