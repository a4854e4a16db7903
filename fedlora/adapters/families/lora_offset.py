"""Low-rank adapters that start anywhere: ΔW = s·((B + dB)·(A + dA) − B·A), both factors trained.

For methods whose factors do not start with a product of 0, with both factors trained: PiSSA (NeurIPS 2024,
arXiv:2404.02948, start `weight-scaled`) and LoRA-GA (NeurIPS 2024, arXiv:2407.05000, a start from gradients).
They take the first product off the weight. Here the weight stays as it is, and the product is taken off the update.

    A    (r, d_in)    frozen, from the start's bases
    B    (d_out, r)   frozen, from the start's bases
    dA   (r, d_in)    trained, starts at 0
    dB   (d_out, r)   trained, starts at 0

Trained and sent are the changes of the factors, whose gradients are those of the factors. The update is computed as
s·(dB·(A + dA) + B·dA). So it is 0 bit for bit at the start, and no large products cancel. It is bilinear in the
changes, as that of the family `lora` is in the factors, and has rank 2r. With B = 0, where EVA's paper starts, it is
that family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


class OffsetDelta(Delta):
    """The update s·(dB((A + dA) x) + B(dA x)). The arguments after `scaling` are the leaves of these tensors."""

    def __init__(self, scaling: float, A: nn.Module, B: nn.Module, dA: nn.Module, dB: nn.Module) -> None:
        super().__init__()
        self.scaling = scaling
        self.A, self.B, self.dA, self.dB = A, B, dA, dB

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        turned: torch.Tensor = self.dA(x)
        update: torch.Tensor = self.dB(self.A(x) + turned) + self.B(turned)
        return update * self.scaling


@dataclass(frozen=True)
class LoraOffset(Family):
    """The family in which both factors train from where they start."""

    name: ClassVar[str] = "lora-offset"
    exact: ClassVar[bool] = False
    bases: ClassVar[tuple[str, ...]] = ("A", "B")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [TensorSpec(f"{site.name}.{factor}", shape, trains=factor.startswith("d"), sites=(site.name,))
                for site in sites for factor, shape in _shapes(site).items()]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return OffsetDelta(site.scaling, *(leaves.linear(f"{site.name}.{factor}", *shape)
                                           for factor, shape in _shapes(site).items()))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        assert bases.B is not None, "a start without B is refused earlier"
        first = {"A": bases.A, "B": bases.B}
        return {f"{site.name}.{factor}": first.get(factor, torch.zeros(shape))
                for factor, shape in _shapes(site).items()}

    @override
    def exact_in(self, trained: Collection[str]) -> bool:
        sites = {factor: {name[:-3] for name in trained if name.endswith(f".{factor}")} for factor in ("dA", "dB")}
        return not sites["dA"] & sites["dB"]

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        A, B, dA, dB = (state[f"{site.name}.{factor}"].astype(np.float64) for factor in _shapes(site))
        return LowRank(B=np.hstack([dB, B]), A=np.vstack([A + dA, dA]))


def _shapes(site: Site) -> Mapping[str, tuple[int, int]]:
    """Return the shape of each of a site's tensors, in the order of `OffsetDelta`'s arguments."""
    of_A, of_B = (site.rank, site.d_in), (site.d_out, site.rank)
    return {"A": of_A, "B": of_B, "dA": of_A, "dB": of_B}


FAMILY = LoraOffset
