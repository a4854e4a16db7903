"""A strategy of your own: FedSVD whose B fades between rounds, with momentum at the server.

    fedlora-simulate --strategy examples.own_strategy:FadingFedSVD --strategy-options fade=0.05 --data notes/ …
    fedlora-server   --strategy examples.own_strategy:FadingFedSVD …

from the folder that holds `examples/`. Clients need none of it: they are told a name and an adapter family, which is
FedSVD's, as are the values of a run that names no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors
from fedlora_strategies import FedSVD
from fedlora_strategies.schedules.constant import Constant
from fedlora_strategies.server_optimizers.momentum import Momentum


@dataclass(frozen=True)
class Fading(Constant):
    """Attributes: fade: how much of the adapters' trained tensors is lost after each round, in [0, 1)."""

    fade: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.fade < 1:
            raise ValueError(f"fade is {self.fade:g}; it must be at least 0 and below 1")

    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        kept = np.float32(1 - self.fade)
        return {**state, **{spec.name: kept * state[spec.name]
                            for spec in layout.trained if spec.group == "adapter"}}, own


class FadingFedSVD(FedSVD):
    """FedSVD, but for what stands here."""

    recipe = replace(FedSVD.recipe, schedule=Fading(), optimizer=Momentum(lr=0.5, beta1=0.5))
