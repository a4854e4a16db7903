"""The lengths of the weight's rows: ΔW = s·diag(e)·diag(V)·W0, linear in e. Every row keeps its direction.

Liu et al. (DoRA), ICML 2024, arXiv:2402.09353, train such lengths beside a low-rank change of the directions. The two
together are not linear. Alone, the lengths are; they are what is trained here.

    V   (d_out,)   frozen, one over the length of each row of W0
    e   (d_out,)   trained, starts at 0: how much longer each row becomes, times s

The rank plays no part but in s = alpha / r. The update has no low rank; PEFT holds it as a DoRA adapter whose B is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import RowScale
from fedlora.plan import Tensors


class RowScaleDelta(Delta):
    """The update s·e * (V * W0 x), from the base layer's own output without its bias."""

    def __init__(self, scaling: float, V: nn.Module, e: nn.Module) -> None:
        super().__init__()
        self.scaling = scaling
        self.V, self.e = V, e

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        own, bias = output.to(x.dtype), cast("torch.Tensor | None", base.bias)
        product = own if bias is None else own - bias.to(x.dtype)
        scaled: torch.Tensor = self.e(self.V(product))
        return scaled * self.scaling


@dataclass(frozen=True)
class RowLengths(Family):
    """The family in which only the lengths of the weight's rows train."""

    name: ClassVar[str] = "row-scale"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ("V",)

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.V", (site.d_out,), trains=False, sites=(site.name,)),
            TensorSpec(f"{site.name}.e", (site.d_out,), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return RowScaleDelta(site.scaling, leaves.diagonal(f"{site.name}.V", site.d_out),
                             leaves.diagonal(f"{site.name}.e", site.d_out))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.V is not None, "a start without V is refused earlier"
        return {f"{site.name}.V": bases.V, f"{site.name}.e": torch.zeros(site.d_out)}

    @override
    def update(self, state: Tensors, site: Site) -> RowScale:
        V = state[f"{site.name}.V"].astype(np.float64)
        return RowScale(rows=V * state[f"{site.name}.e"], lengths=1 / V)


FAMILY = RowLengths
