"""Server optimizers, which apply the mean of the uploads to the server's tensors: each file of this folder is one.

A file defines `OPTIMIZER`, a frozen dataclass that fits the protocol `ServerOptimizer`.

Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295: the mean change of the clients' tensors is,
up to a factor, the negative gradient of their common loss. A server optimizer treats it as a gradient.

    Paper    Here       Meaning
    x_t      values     the trained tensors as the server holds them: not rounded, also in a bf16 run
    Δ_t      gradient   mean of the uploads − what clients were sent: the pseudo-gradient, pointing downhill
    η        lr         the server's learning rate
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import numpy as np

from fedlora.plan import Tensors


class ServerOptimizer(Protocol):
    """A server optimizer. It is a frozen dataclass whose fields are numbers: the user's options, `lr` among them.

    Its memory is float64 arrays named "<moment>/<tensor>", which are kept from round to round and in checkpoints. The
    memory of a tensor that did not train in a round stays as it is.

    Attributes:
        moments: Name of a moment → the power of the pseudo-gradient that it averages; 0 for a count of the tensor's
            steps.
    """

    moments: ClassVar[Mapping[str, int]]

    def begin(self, trained: Tensors) -> Tensors:
        """Return the memory before the first round."""

    def step(self, gradient: Tensors, own: Tensors, progress: float) -> tuple[Tensors, Tensors]:
        """Take one step.

        Args:
            gradient: Tensor name → pseudo-gradient, float64.
            own: The memory.
            progress: The share of the planned rounds that are over, in [0, 1).

        Returns:
            The changes to add to the values, and the next memory.
        """

    def turn(self, own: Tensors, factors: Mapping[str, np.ndarray | None]) -> Tensors:
        """Return the memory in new coordinates, after a refactorization of trained tensors.

        Args:
            own: The memory.
            factors: Tensor name → the matrix M that takes the tensor W to W M, or None if its memory must begin anew.
        """
