"""AdamW: each value's step in units of its own recent gradients (Loshchilov and Hutter, arXiv:1711.05101)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

BETAS = 0.9, 0.999
"""PyTorch's own."""


def adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """PyTorch's, without weight decay, which would pull an adapter back to where the round did not begin."""
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0)


def reach(steps: int) -> float:
    r"""How far so many steps move one value at most, in units of the rate.

    Step t is m_t / (sqrt(v_t) + eps), of means whose bias is corrected. By Cauchy and Schwarz it is at most
    (1 - b1) / sqrt(1 - b2) · sqrt(sum_{j<t} (b1^2 / b2)^j) · sqrt(1 - b2^t) / (1 - b1^t): 1 in the first step, and
    hardly more in the next ones.
    """
    b1, b2 = BETAS
    ratio, first = b1**2 / b2, (1 - b1) / math.sqrt(1 - b2)
    return sum(first * math.sqrt((1 - ratio**t) / (1 - ratio)) * math.sqrt(1 - b2**t) / (1 - b1**t)
               for t in range(1, steps + 1))


OPTIMIZER = adamw
REACH = reach
