"""Stochastic gradient descent: a step along the gradient, and no memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def sgd(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """PyTorch's, without momentum."""
    return torch.optim.SGD(parameters, lr=lr)


OPTIMIZER = sgd
LINEAR = True
