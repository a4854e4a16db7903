"""What is done with the mean at the server: one file each, whose `OPTIMIZER` is a frozen `ServerOptimizer`.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295: the mean of what clients moved is the
negative gradient, up to a factor, of the loss of all of them, and an optimiser at the server takes it as that.

Paper    Here       Meaning
x_t      values     the trained tensors that the server keeps; without rounding, also where bf16 travels
Δ_t      gradient   mean of the uploads − what clients were sent: the pseudo-gradient, pointing downhill
η        lr         the server's learning rate
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from fedlora.plan import Tensors


class ServerOptimizer(Protocol):
    """An optimiser at the server; a frozen dataclass whose fields, numbers, are its options, `lr` among them.

    Memory is named "<moment>/<tensor>", float64, and kept over rounds and in the checkpoint. A tensor without a
    pseudo-gradient, for it did not train in this round, keeps its memory as it was.

    Attributes:
        moments: name → of which power of the pseudo-gradient it is an average; 0 for a count of the tensor's steps.
    """

    moments: ClassVar[Mapping[str, int]]

    def begin(self, trained: Tensors) -> Tensors:
        """The memory before the first round."""

    def step(self, gradient: Tensors, own: Tensors, progress: float) -> tuple[Tensors, Tensors]:
        """What is added to the values, and the next memory.

        Args:
            gradient: name → pseudo-gradient, float64.
            own: the memory.
            progress: share of the planned rounds that are over, in [0, 1).
        """

    def turn(self, own: Tensors, factors: Mapping[str, np.ndarray | None]) -> Tensors:
        """The memory once a refactorisation has changed the coordinates of trained tensors.

        Args:
            factors: name → M where the tensor W is W M now, or None where its memory must begin anew.
        """
