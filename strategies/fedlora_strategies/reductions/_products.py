"""The mean of the products B_k A_k, cut to the adapter's rank: FlexLoRA's average.

    U, Σ, Vᵀ ← thin SVD of Σ p_k B_k A_k
    B ← U_r √Σ_r,   A ← √Σ_r V_rᵀ

No other B A of rank r is as close to the mean of the updates (L2 norm). What is lost are the singular values beyond r.
How Σ is shared between the factors is a choice: in equal parts, which makes them as short as they can be. A direction
without strength keeps its row of A, with the length of the strongest, so that it can learn again. The m × n product is
never formed. A factor that trains alone in a round is averaged as it is, which is exact; and so are both factors where
every product is 0.

A client may train the first r_k ranks alone: its B_k A_k has this rank, and the mean is still cut to r. The singular
values fall, so the first ranks of the result are its best approximation of that rank, from which the client starts.

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

from . import Collected, FactorReduction

ROUNDING = 1e-7
"""A singular value that is this much smaller than the largest one counts as 0."""


@dataclass(frozen=True)
class Products(FactorReduction):
    """The reduction of FlexLoRA. The plan's `weight_by_examples` decides about the weights, as for the mean."""

    linear: ClassVar[bool] = False
    refreshes_frozen: ClassVar[bool] = False
    takes_ranks: ClassVar[bool] = True

    @override
    def check(self, layout: AdapterLayout) -> None:
        if other := [spec.name for spec in layout.state if spec.group == "adapter"
                     and not (spec.trains and spec.name.endswith((".A", ".B")))]:
            raise ValueError("the reduction of flexlora averages products of two trained factors, and adapters of the "
                             f"family {layout.family.name!r} have {other[0]!r}; name the family lora in the recipe")
        for site in layout.sites:
            if site.rank > min(site.d_out, site.d_in):
                raise ValueError(f"rank {site.rank} exceeds the smaller side of {site.name}, "
                                 f"{min(site.d_out, site.d_in)}, which no product can have. Choose a smaller --rank")

    @override
    def averages_updates(self, layout: AdapterLayout) -> bool:
        return False

    @override
    def begin(self, sent: Tensors) -> Collected:
        return Collected(lambda uploads, weights: _combined([_whole(upload, sent) for upload in uploads], weights))


def _whole(upload: Tensors, sent: Tensors) -> Tensors:
    """Return an upload with all ranks: columns of B that it lacks are 0, rows of A are as they were sent.

    Args:
        upload: The upload, with at least the first rank of each layer.
        sent: The tensors of the whole rank, as they were sent.
    """
    whole = dict(upload)
    for name, array in upload.items():
        ranks = array.shape[0] if name.endswith(".A") else array.shape[-1]
        if name.endswith(".A") and ranks < len(sent[name]):
            whole[name] = np.concatenate([array, sent[name][ranks:]])
        elif name.endswith(".B") and ranks < sent[name].shape[1]:
            whole[name] = np.pad(array, ((0, 0), (0, sent[name].shape[1] - ranks)))
    return whole


@np.errstate(over="ignore")  # the strategy checks that the state is finite
def _combined(uploads: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    result = weighted_mean(uploads, weights)
    for name in [name for name in result if name.endswith(".B") and f"{name[:-2]}.A" in result]:
        B, A = ([upload[f"{name[:-2]}.{factor}"].astype(np.float64) for upload in uploads] for factor in "BA")
        columns = np.hstack([one * (weight / sum(weights)) for one, weight in zip(B, weights, strict=True)])
        if columns.any():
            best, _ = truncated(Factors(torch.from_numpy(columns), torch.from_numpy(np.vstack(A))), A[0].shape[0])
            strengths = best.B.norm(dim=0)
            strengths = torch.where(strengths > ROUNDING * strengths.max(), strengths, strengths.max())
            result |= {name: (best.B / strengths.sqrt()).numpy().astype(np.float32, order="C"),
                       f"{name[:-2]}.A": (best.A * strengths.sqrt()[:, None]).numpy().astype(np.float32, order="C")}
    return result
