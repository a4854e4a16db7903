"""AdamW: divide each value's step by the size of its own recent gradients.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

BETAS = 0.9, 0.999
"""PyTorch's defaults: the decay rates b1 and b2 of the means of the gradient and of its square."""


def adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return PyTorch's AdamW without weight decay, which would pull the adapter towards 0 and not the round's start."""
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0)


def reach(steps: int) -> float:
    r"""Return the largest distance that this many steps can move one value, in units of the learning rate.

    Step t is m_t / (sqrt(v_t) + eps), where m_t and v_t are the bias-corrected means of the gradient and its square.
    By the Cauchy-Schwarz inequality it is at most
    (1 - b1) / sqrt(1 - b2) · sqrt(sum_{j<t} (b1^2 / b2)^j) · sqrt(1 - b2^t) / (1 - b1^t).
    That is 1 in the first step, and hardly more in the next ones.
    """
    b1, b2 = BETAS
    ratio, first = b1**2 / b2, (1 - b1) / math.sqrt(1 - b2)
    return sum(first * math.sqrt((1 - ratio**t) / (1 - ratio)) * math.sqrt(1 - b2**t) / (1 - b1**t)
               for t in range(1, steps + 1))


OPTIMIZER = adamw
REACH = reach
