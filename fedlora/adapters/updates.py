"""The forms that the update ΔW of a site can have, and how PEFT holds each of them.

A family's `update` returns one of them. All are ΔW / s, where s is the site's scaling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from typing_extensions import override


class PeftTensors(NamedTuple):
    """What a PEFT folder holds of one site.

    Attributes:
        tensors: the name after the site's own, such as "lora_B.weight" → values.
        rank: PEFT's r of the site.
        alpha: PEFT's lora_alpha of the site.
    """

    tensors: Mapping[str, np.ndarray]
    rank: int
    alpha: float

    @classmethod
    def lora(cls, B: np.ndarray, A: np.ndarray, scaling: float) -> PeftTensors:
        """Return the LoRA adapter of the update scaling·B·A."""
        return cls({"lora_A.weight": A, "lora_B.weight": B}, A.shape[0], scaling * A.shape[0])


class Update(ABC):
    """The update ΔW / s of one site."""

    @abstractmethod
    def change(self, weight: np.ndarray) -> np.ndarray:
        """Return ΔW / s, (d_out, d_in) float64, of a weight W0 of this shape."""

    def for_peft(self, scaling: float, weight: Callable[[], np.ndarray]) -> PeftTensors:
        """Return the update as a PEFT folder holds it: unless a form has a smaller one, as LoRA of full rank.

        One factor is then the identity and the other the whole change, so it is exact, and as large as the weight.

        Args:
            scaling: s of the site.
            weight: returns the weight W0, (d_out, d_in).
        """
        change = self.change(weight())
        d_out, d_in = change.shape
        if d_in <= d_out:
            return PeftTensors.lora(change, np.eye(d_in), scaling)
        return PeftTensors.lora(np.eye(d_out), change, scaling)


@dataclass(frozen=True)
class LowRank(Update):
    """The update B·A.

    Attributes:
        B: (d_out, k).
        A: (k, d_in).
    """

    B: np.ndarray
    A: np.ndarray

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        return self.B.astype(np.float64) @ self.A.astype(np.float64)

    @override
    def for_peft(self, scaling: float, weight: Callable[[], np.ndarray]) -> PeftTensors:
        return PeftTensors.lora(self.B, self.A, scaling)


@dataclass(frozen=True)
class RowScale(Update):
    """The update diag(rows)·W0: the weight's rows change their lengths. PEFT holds it as DoRA, of rank 1 with B = 0.

    Attributes:
        rows: (d_out,) change of each row's length, as a share of the length.
        lengths: (d_out,) the rows' lengths in W0.
    """

    rows: np.ndarray
    lengths: np.ndarray

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        change: np.ndarray = self.rows.astype(np.float64)[:, None] * weight
        return change

    @override
    def for_peft(self, scaling: float, weight: Callable[[], np.ndarray]) -> PeftTensors:
        d_out, d_in = len(self.rows), weight().shape[1]
        return PeftTensors({"lora_magnitude_vector": self.lengths * (1 + scaling * self.rows),
                            "lora_A.weight": np.zeros((1, d_in)), "lora_B.weight": np.zeros((d_out, 1))}, 1, 1.0)
