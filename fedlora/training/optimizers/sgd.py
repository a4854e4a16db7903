"""Stochastic gradient descent: step along the gradient, without momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def sgd(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return PyTorch's SGD without momentum."""
    return torch.optim.SGD(parameters, lr=lr)


OPTIMIZER = sgd
LINEAR = True
