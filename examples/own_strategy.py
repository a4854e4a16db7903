"""Example of a strategy of one's own: FedSVD whose trained factor B fades between rounds, with momentum at the server.

Run it from the folder that holds `examples/`:

    fedlora-simulate --strategy examples.own_strategy:FadingFedSVD --strategy-options fade=0.05 --data notes/ …
    fedlora-server   --strategy examples.own_strategy:FadingFedSVD …

Clients need no copy of this file: a client is told the strategy's name and its adapter family, which is FedSVD's. The
default values of a run are FedSVD's too.
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
    """A schedule that shrinks the adapters' trained tensors after each round.

    Attributes:
        fade: The share of their values that is lost in each round, in [0, 1).
    """

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
    """FedSVD with another schedule and a server optimizer."""

    recipe = replace(FedSVD.recipe, schedule=Fading(), optimizer=Momentum(lr=0.5, beta1=0.5))
