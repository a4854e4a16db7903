"""The forms that the update ΔW of a site can have, and how PEFT holds each of them.

A family's `update` returns one of them. All are ΔW / s, where s is the site's scaling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from peft import MissConfig, PeftConfig
from typing_extensions import override

LEAST_FACTOR = 1e-2
"""Smallest factor on a row's length by which a DoRA adapter's B is divided. Smaller ones would lose digits."""


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


class OtherType(NamedTuple):
    """What a PEFT folder holds of one site in another of PEFT's types than LoRA.

    Attributes:
        form: the type's name, for people.
        config: the type's configuration.
        settings: the arguments of the configuration that belong to the type. They must be the same for all sites.
        tensors: the name after the site's own → values.
    """

    form: str
    config: Callable[..., PeftConfig]
    settings: Mapping[str, int | str]
    tensors: Mapping[str, np.ndarray]


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

    def of_other_type(self, scaling: float) -> OtherType | None:
        """Return the update in another of PEFT's types, where that is smaller; None if LoRA holds it best.

        It is used if all sites have one with the same settings, and the model has nothing that PEFT handles in LoRA
        alone: weights of the shape (d_in, d_out), heads of several layers.
        """
        return None


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
class Whole(Update):
    """The update D, of full rank.

    Attributes:
        D: (d_out, d_in).
    """

    D: np.ndarray

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        return self.D.astype(np.float64)


@dataclass(frozen=True)
class RowScale(Update):
    """The update diag(rows)·W0, which changes the lengths of the weight's rows, and B·A beside it if there is one.

    PEFT holds it as DoRA, which rescales the rows of W0 + s·B·A: the rows of B are divided by what they are then
    multiplied with.

    Attributes:
        rows: (d_out,) change of each row's length, as a share of the length.
        lengths: (d_out,) the rows' lengths in W0.
        beside: the update B·A; None for nothing.
    """

    rows: np.ndarray
    lengths: np.ndarray
    beside: LowRank | None = None

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        change: np.ndarray = self.rows.astype(np.float64)[:, None] * weight
        return change if self.beside is None else change + self.beside.change(weight)

    @override
    def for_peft(self, scaling: float, weight: Callable[[], np.ndarray]) -> PeftTensors:
        factors = 1 + scaling * self.rows
        if self.beside is None:
            d_out, d_in = len(self.rows), weight().shape[1]
            return _dora(PeftTensors.lora(np.zeros((d_out, 1)), np.zeros((1, d_in)), 1.0), self.lengths * factors)
        W0 = weight()
        if np.abs(factors).min() < LEAST_FACTOR:
            whole = super().for_peft(scaling, weight)
            return _dora(whole, np.linalg.norm(W0 + scaling * self.change(W0), axis=1))
        B, A = self.beside.B.astype(np.float64) / factors[:, None], self.beside.A
        return _dora(PeftTensors.lora(B, A, scaling), factors * np.linalg.norm(W0 + scaling * B @ A, axis=1))


def _dora(lora: PeftTensors, lengths: np.ndarray) -> PeftTensors:
    """Return the DoRA adapter of a LoRA adapter, whose rows of the changed weight get these lengths."""
    return PeftTensors({"lora_magnitude_vector": lengths, **lora.tensors}, lora.rank, lora.alpha)


@dataclass(frozen=True)
class Blocks(Update):
    """The update (W_oc + I)·b_o of each block of W0, in row o and column c of the blocks. PEFT holds it as MiSS.

    Attributes:
        b: (d_out, r), the blocks b_o below each other.
    """

    b: np.ndarray

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        r, (d_out, d_in) = self.b.shape[1], weight.shape
        blocks = weight.reshape(d_out // r, r, d_in // r, r) + np.eye(r)[:, None]
        change: np.ndarray = np.einsum("oicj,ojk->oick", blocks, self.b.astype(np.float64).reshape(-1, r, r))
        return change.reshape(d_out, d_in)

    @override
    def of_other_type(self, scaling: float) -> OtherType:
        r = self.b.shape[1]
        return OtherType("MiSS", MissConfig, {"r": r, "init_weights": "bat"},
                         {"miss_block": scaling * self.b.astype(np.float64).reshape(-1, r, r)})
