"""The whole change of the weight, of full rank: ΔW = s·D, linear in D.

    D   (d_out, d_in)   trained, starts at 0

There is nothing frozen but the weight, so no start is needed, and the rank counts for the scaling alone. In runs
without privacy, clients release their gradients in it where a start needs them whole (`fedlora.adapters.sketches`). No
strategy trains it: what travels is as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters.families.lora import LowRankDelta
from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.updates import Whole
from fedlora.plan import Tensors


@dataclass(frozen=True)
class Full(Family):
    """The family in which a matrix of the weight's own shape trains."""

    name: ClassVar[str] = "full"
    exact: ClassVar[bool] = True
    bases: ClassVar[tuple[str, ...]] = ()

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [TensorSpec(f"{site.name}.D", (site.d_out, site.d_in), sites=(site.name,)) for site in sites]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return LowRankDelta(site.scaling, leaves.linear(f"{site.name}.D", site.d_out, site.d_in))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        return {f"{site.name}.D": torch.zeros(site.d_out, site.d_in)}

    @override
    def update(self, state: Tensors, site: Site) -> Whole:
        return Whole(state[f"{site.name}.D"])


FAMILY = Full
