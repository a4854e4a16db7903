"""Local optimisers: what a client does with the gradient of a step. Each file of this folder is one, found by its name.

A file says `OPTIMIZER = ` a function from the trained parameters and the learning rate to an optimiser of PyTorch's
kind. A fresh one is made for each client and round, so that it remembers nothing of another.

It may say how far it can go, by which a server tells an upload that no training can have made: `REACH = ` a function
from a number of steps to how far they can move one value, in units of the learning rate and whatever the gradients are;
or `LINEAR = True` where the steps are the gradients, times the rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedlora import registry


def make_optimizer(key: str, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """A fresh optimiser.

    Args:
        key: as in "adamw".
        parameters: those that train.
        lr: the learning rate of the round.

    Raises:
        ValueError: none is called so.
    """
    return registry.load("fedlora.training.optimizers", key).OPTIMIZER(parameters, lr)
