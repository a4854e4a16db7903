"""AdamW: each value's step in units of its own recent gradients (Loshchilov and Hutter, arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """PyTorch's, without weight decay, which would pull an adapter back to where the round did not begin."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


OPTIMIZER = adamw
