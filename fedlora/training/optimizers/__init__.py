"""Clients' local optimizers: each file of this folder is one, found by its name.

A file defines `OPTIMIZER`, a function of the trained parameters and the learning rate that returns a
`torch.optim.Optimizer`. A fresh one is made for each client and round, so that no memory passes from one to another.

A file may also state how far the optimizer can move a value. The server uses this to reject uploads that no training
can have produced (`fedlora_strategies.screening`). It is one of:

    REACH    a function: number of steps → the largest distance that one value can move, in units of the learning rate,
             whatever the gradients are
    LINEAR   True, where a step is the gradient times the learning rate
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedlora import registry


def make_optimizer(key: str, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return a fresh optimizer.

    Args:
        key: The optimizer's name, for example "adamw".
        parameters: The parameters to train.
        lr: The learning rate of the round.

    Raises:
        ValueError: No optimizer of this name is installed.
    """
    optimizer: torch.optim.Optimizer = registry.load("fedlora.training.optimizers", key).OPTIMIZER(parameters, lr)
    return optimizer
