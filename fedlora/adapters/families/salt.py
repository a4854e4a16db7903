"""The leading singular values, and a low-rank change of what lies beside them: ΔW is linear in what trains.

Elsayed et al. (SALT), 2025, arXiv:2503.16055, train both parts, here without what makes theirs nonlinear.

    A   (k, d_in)        frozen, leading right singular vectors of W0 as rows (start `weight`)
    B   (d_out, k)       frozen, leading left singular vectors as columns
    e   (k,)             trained, starts at 0: the change of the k largest singular values
    P   (d_out, r − k)   frozen, random, with orthonormal columns that are orthogonal to those of B
    Y   (r − k, d_in)    trained, starts at 0

    ΔW = s·(B·diag(e)·A + P·Y·(I − AᵀA))

The rank r counts both parts, and the update has that rank. With Y = 0 it is that of the family `diagonal`.

The paper writes the second part as U⊥·X·Y'·V⊥ᵀ, with all other singular vectors U⊥ and V⊥ and a trained Y' of as many
columns as there are of them. Here U⊥·X is the one frozen P, and Y' = Y·V⊥, so that the vectors need not be sent. For a
layer with as many inputs as outputs the updates are the same; where one side is longer, the second part may also reach
the directions of it that W0 does not. The paper also cuts the changed values at 0 and scales the leading ones by a
second trained factor: neither is linear, and both are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.leaves import Diagonal, Linear
from fedlora.adapters.updates import LowRank
from fedlora.algebra import orthonormal_rows
from fedlora.plan import Tensors


class SaltDelta(Delta):
    """The update s·(B(e * A x) + P Y (x − Aᵀ A x))."""

    def __init__(self, scaling: float, *, A: Linear, e: Diagonal, B: Linear, Y: Linear, P: Linear) -> None:
        super().__init__()
        self.scaling = scaling
        self.A, self.e, self.B, self.Y, self.P = A, e, B, Y, P

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        leading = self.A(x)
        beside = x - F.linear(leading, self.A.weight.T)
        added: torch.Tensor = self.B(self.e(leading)) + self.P(self.Y(beside))
        return added * self.scaling


@dataclass(frozen=True)
class Salt(Family):
    """The family in which the leading singular values and a low-rank rest train.

    Attributes:
        top: k, how many of the rank's values are leading singular values; 0 for half of the rank.
    """

    name: ClassVar[str] = "salt"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("A", "B")
    top: int = 0

    def __post_init__(self) -> None:
        if self.top < 0:
            raise ValueError(f"top is {self.top}; it must be at least 1, or 0 for half of the rank")

    def leading(self, site: Site) -> int:
        """Return k of a site.

        Raises:
            ValueError: it leaves nothing of the rank to one of the two parts.
        """
        k = self.top or site.rank // 2
        if not 0 < k < site.rank:
            raise ValueError(f"the adapter family salt needs rank 2 or more, and {site.name} has rank {site.rank}; "
                             "choose a larger --rank" if site.rank < 2 else
                             f"top is {k}, and {site.name} has rank {site.rank}, which counts the leading singular "
                             "values and the rest; choose a smaller top, or a larger --rank")
        return k

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for k in [self.leading(site)] for spec in (
            TensorSpec(f"{site.name}.A", (k, site.d_in), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, k), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.P", (site.d_out, site.rank - k), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.Y", (site.rank - k, site.d_in), sites=(site.name,)),
            TensorSpec(f"{site.name}.e", (k,), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        k = self.leading(site)
        return SaltDelta(site.scaling, A=leaves.linear(f"{site.name}.A", k, site.d_in),
                         e=leaves.diagonal(f"{site.name}.e", k), B=leaves.linear(f"{site.name}.B", site.d_out, k),
                         Y=leaves.linear(f"{site.name}.Y", site.rank - k, site.d_in),
                         P=leaves.linear(f"{site.name}.P", site.d_out, site.rank - k))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused earlier"
        k = self.leading(site)
        A, B = bases.A[:k], bases.B[:, :k]
        span, drawn = torch.linalg.qr(B.double())[0], draw(f"{site.name}.P", (site.d_out, site.rank - k))
        return {f"{site.name}.A": A, f"{site.name}.B": B,
                f"{site.name}.P": orthonormal_rows((drawn - span @ (span.T @ drawn)).T).T,
                f"{site.name}.Y": torch.zeros(site.rank - k, site.d_in), f"{site.name}.e": torch.zeros(k)}

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        A, B, P, Y, e = (state[f"{site.name}.{factor}"].astype(np.float64) for factor in "ABPYe")
        return LowRank(B=np.hstack([B * e, P]), A=np.vstack([A, Y - (Y @ A.T) @ A]))


FAMILY = Salt
