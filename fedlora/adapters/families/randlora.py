"""RandLoRA: full rank from shared random factors, ΔW = s·Σ_j B_j·diag(λ_j)·A·diag(γ_j), with λ and γ trained.

Albert et al., ICLR 2025, arXiv:2502.00987.

    A   (r, small)         frozen, random, shared by sites of the same size and rank
    B   (large, r·N)       frozen, random, shared likewise: B_1 to B_N side by side
    λ   (r·N,)             trained, starts at 0: `lambda`
    γ   (N·small,)         trained, starts at 1 / the larger of N and small: `gamma`

`small` and `large` are the smaller and the larger side of the weight, and N = ⌈small / r⌉. Where a layer has more
inputs than outputs, the whole sum is transposed. A and B are normal, with a mean square of 1; no start decides them.
The paper draws one A and one B of the largest size, and each layer takes a part of them.

While all γ_j are alike, the sum has rank r, because all terms share A. It reaches full rank as they come apart.

With the option `gamma = 0`, γ is frozen at values of this size with random signs. Then the update is linear in λ, of
full rank from the first step, and has about as many trained values as the weight's smaller side. With γ trained it is
bilinear, and private runs refuse it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora.adapters.family import Bases, Delta, Draw, Family, Leaves, Site, TensorSpec
from fedlora.adapters.leaves import Diagonal, Linear
from fedlora.adapters.updates import LowRank
from fedlora.plan import Tensors


class RandLoraDelta(Delta):
    """The update s·Σ_j B_j(λ_j * A(γ_j * x)), or its transpose. The arguments after `scaling` are the tensors' leaves.

    The N terms stand side by side: γ_j * x as [..., N·small], and what A makes of them as [..., r·N].
    """

    def __init__(self, site: Site, A: Linear, B: Linear, core: Diagonal, inputs: Diagonal) -> None:
        super().__init__()
        self.scaling, self.terms, self.transposed = site.scaling, _terms(site), site.d_in > site.d_out
        self.A, self.B, self.core, self.inputs = A, B, core, inputs

    @override
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        if self.transposed:
            inner: torch.Tensor = self.core(x @ self.B.weight).unflatten(-1, (self.terms, -1))
            update: torch.Tensor = self._scaled(inner @ self.A.weight).sum(dim=-2)
        else:
            many = self._scaled(x[..., None, :].expand(*x.shape[:-1], self.terms, x.shape[-1]))
            update = self.B(self.core(self.A(many).flatten(-2)))
        return update * self.scaling

    def _scaled(self, many: torch.Tensor) -> torch.Tensor:
        """Multiply [..., N, small] by γ."""
        scaled: torch.Tensor = self.inputs(many.flatten(-2)).unflatten(-1, (self.terms, -1))
        return scaled


@dataclass(frozen=True)
class RandLora(Family):
    """The family in which two diagonals between and beside shared random factors train.

    Attributes:
        gamma: whether γ trains: 1, or 0 for λ alone, with random signs in γ.
    """

    name: ClassVar[str] = "randlora"
    exact: ClassVar[bool] = False
    bases: ClassVar[tuple[str, ...]] = ()
    gamma: int = 1

    def __post_init__(self) -> None:
        if self.gamma not in (0, 1):
            raise ValueError(f"gamma is {self.gamma}; it must be 1 (lambda and gamma train) or 0 (lambda alone)")

    @override
    def why_not_private(self) -> str:
        return ("gamma has far more values than lambda, starts near 0 and has no gradient before lambda has grown, so "
                "that little but noise would be left of it. Train lambda alone with --family-options gamma=0"
                if self.gamma else "")

    @override
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        sharing: dict[tuple[str, str], list[Site]] = {}
        for site in sites:
            sharing.setdefault(_shared(site), []).append(site)
        fixed = [TensorSpec(name, shape, trains=False, sites=tuple(site.name for site in some))
                 for names, some in sharing.items() for name, shape in zip(names, _shapes(some[0]), strict=True)]
        return fixed + [spec for site in sites for spec in (
            TensorSpec(f"{site.name}.lambda", (site.rank * _terms(site),), sites=(site.name,)),
            TensorSpec(f"{site.name}.gamma", (_terms(site) * _sides(site)[0],), trains=bool(self.gamma),
                       sites=(site.name,)))]

    @override
    def build(self, site: Site, leaves: Leaves) -> Delta:
        A, B = (leaves.linear(name, *shape) for name, shape in zip(_shared(site), _shapes(site), strict=True))
        return RandLoraDelta(site, A, B, leaves.diagonal(f"{site.name}.lambda", site.rank * _terms(site)),
                             leaves.diagonal(f"{site.name}.gamma", _terms(site) * _sides(site)[0]))

    @override
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        factors = {name: draw(name, shape) for name, shape in zip(_shared(site), _shapes(site), strict=True)}
        (small, _), terms = _sides(site), _terms(site)
        gamma = torch.full((terms * small,), 1 / max(terms, small))
        if not self.gamma:
            gamma = gamma * draw(f"{site.name}.gamma", (terms * small,)).sign()
        return {name: values / values.square().mean().sqrt() for name, values in factors.items()} | {
            f"{site.name}.lambda": torch.zeros(site.rank * terms), f"{site.name}.gamma": gamma}

    @override
    def exact_in(self, trained: Collection[str]) -> bool:
        of_lambda, of_gamma = ({name.removesuffix(end) for name in trained if name.endswith(end)}
                               for end in (".lambda", ".gamma"))
        return not of_lambda & of_gamma

    @override
    def update(self, state: Tensors, site: Site) -> LowRank:
        A, B = (state[name].astype(np.float64) for name in _shared(site))
        gamma = state[f"{site.name}.gamma"].reshape(_terms(site), 1, -1)
        left, right = B * state[f"{site.name}.lambda"], (A * gamma).reshape(-1, A.shape[1])
        return LowRank(B=right.T, A=left.T) if site.d_in > site.d_out else LowRank(B=left, A=right)


def _sides(site: Site) -> tuple[int, int]:
    """Return the smaller and the larger side of a site's weight."""
    return min(site.d_out, site.d_in), max(site.d_out, site.d_in)


def _terms(site: Site) -> int:
    """Return N, with which N products of rank r reach the weight's full rank."""
    return -(-_sides(site)[0] // site.rank)


def _shared(site: Site) -> tuple[str, str]:
    """Return the names of the factors A and B that a site uses, which contain what all its sites have in common."""
    small, large = _sides(site)
    return f"shared.{large}x{small}.{site.rank}.A", f"shared.{large}x{small}.{site.rank}.B"


def _shapes(site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B."""
    small, large = _sides(site)
    return (site.rank, small), (large, site.rank * _terms(site))


FAMILY = RandLora
