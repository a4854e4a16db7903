"""DoRA: W = diag((‖W0‖ + e) / ‖W0 + s·B·A‖)·(W0 + s·B·A), where ‖·‖ is the length of each row; A, B and e are trained.

Liu et al., ICML 2024, arXiv:2402.09353.

    A   (r, d_in)    trained, from the start's bases
    B   (d_out, r)   trained, starts at 0
    e   (d_out,)     trained, starts at 0: the change of each row's length; the paper's m is ‖W0‖ + e

B·A turns the rows of W0, and e alone changes their lengths. As in PEFT, and in the paper to save memory, the lengths
‖W0 + s·B·A‖ count as constants in the backward pass. They depend on the tensors and on no record. So every record has
its own gradient of A, B and e, and private runs can clip it.

The update is not linear in the trained tensors, and not even bilinear. Averaging the tensors of several clients does
not average their updates. Under privacy, the noises of A and B meet in their product and in the lengths.

A row of W0 that is all 0 has no direction. Its update is s·B·A as it is, and its e has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.leaves import Diagonal, Linear
from fedlora.adapters.updates import PeftTensors, Update
from fedlora.plan import Tensors


class DoraDelta(Delta):
    """The update of DoRA, from the base layer's own output without its bias and from its weight.

    With y = W0 x, z = s·B(A x), and k = ‖W0‖ / ‖W0 + s·B·A‖, the update is (k − 1) y + k z + e k (y + z) / ‖W0‖. It is
    0 bit for bit while B and e are 0.
    """

    def __init__(self, scaling: float, A: Linear, B: Linear, e: Diagonal) -> None:
        super().__init__()
        self.scaling = scaling
        self.A, self.B, self.e = A, B, e

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        y, bias = output.to(x.dtype), cast("torch.Tensor | None", base.bias)
        if bias is not None:
            y = y - bias.to(x.dtype)
        z = self.B(self.A(x)) * self.scaling
        k, per_length = self._lengths(base, *self.A.current(), *self.B.current())
        k = k.view(*k.shape[:-1], *[1] * (y.dim() - k.dim()), k.shape[-1])
        update: torch.Tensor = (k - 1) * y + k * z + self.e(k * (y + z) * per_length)
        return update

    @torch.no_grad()
    def _lengths(self, base: nn.Module, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ‖W0‖ / ‖W0 + s·B·A‖, (d_out,) or (records, d_out) if clients share the pass, and 1 / ‖W0‖, (d_out,).

        B·A is never formed: it is as large as the weight, and each client that shares a pass has its own.
        """
        weight = cast(torch.Tensor, base.weight)
        with torch.autocast(weight.device.type, enabled=False):
            W0 = (weight.T if isinstance(base, Conv1D) else weight).to(A.dtype)
            squared = W0.square().sum(dim=1)
            along, beside = ((W0 @ A.mT) * B).sum(dim=-1), ((B @ (A @ A.mT)) * B).sum(dim=-1)
            growth = torch.where(squared > 0, self.scaling * (2 * along + self.scaling * beside) / squared, 0)
            k = 1 / (1 + growth).clamp(min=torch.finfo(A.dtype).tiny).sqrt()
            return k, torch.where(squared > 0, 1 / squared.sqrt(), 0)


@dataclass(frozen=True)
class DoraUpdate(Update):
    """The update of DoRA, of full rank. PEFT has a format for it.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        e: (d_out,) change of each row's length.
        scaling: s.
    """

    A: np.ndarray
    B: np.ndarray
    e: np.ndarray
    scaling: float

    @override
    def change(self, weight: np.ndarray) -> np.ndarray:
        turned = weight + self.scaling * (self.B.astype(np.float64) @ self.A)
        before, after = (np.linalg.norm(matrix, axis=1) for matrix in (weight, turned))
        k = np.divide(before + self.e, after, out=np.ones_like(after), where=before > 0)
        change: np.ndarray = (k[:, None] * turned - weight) / self.scaling
        return change

    @override
    def for_peft(self, scaling: float, weight: Callable[[], np.ndarray]) -> PeftTensors:
        W0, B = weight(), self.B.copy()
        turned = W0 + scaling * (B.astype(np.float64) @ self.A)
        before, after = (np.linalg.norm(matrix, axis=1) for matrix in (W0, turned))
        B[after == 0] = 1  # PEFT divides by this length: a row without one gets a direction, and length 0 along it
        tensors = {"lora_A.weight": self.A, "lora_B.weight": B,
                   "lora_magnitude_vector": np.where(before > 0, before + self.e, after)}
        return PeftTensors(tensors, len(self.A), scaling * len(self.A))


@dataclass(frozen=True)
class Dora(Family):
    """The family in which both factors and the lengths of the weight's rows train."""

    name: ClassVar[str] = "dora"
    exact: ClassVar[bool] = False
    bases: ClassVar[tuple[str, ...]] = ("A",)

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        return [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.A", (site.rank, site.d_in), sites=(site.name,)),
            TensorSpec(f"{site.name}.B", (site.d_out, site.rank), sites=(site.name,)),
            TensorSpec(f"{site.name}.e", (site.d_out,), sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        return DoraDelta(site.scaling, leaves.linear(f"{site.name}.A", site.rank, site.d_in),
                         leaves.linear(f"{site.name}.B", site.d_out, site.rank),
                         leaves.diagonal(f"{site.name}.e", site.d_out))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        return {f"{site.name}.A": bases.A, f"{site.name}.B": torch.zeros(site.d_out, site.rank),
                f"{site.name}.e": torch.zeros(site.d_out)}

    @override
    def exact_in(self, trained: Collection[str]) -> bool:
        return not any(name.endswith((".A", ".B")) for name in trained)

    @override
    def update(self, state: Tensors, site: Site) -> DoraUpdate:
        A, B, e = (state[f"{site.name}.{factor}"] for factor in "ABe")
        return DoraUpdate(A, B, e, site.scaling)


FAMILY = Dora
