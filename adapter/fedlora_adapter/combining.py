"""Ways to make one adapter of several. Each acts on the updates ΔW of one layer at a time, not on factors alone.

    mean               Σ w ΔW, exactly, at the smallest rank that holds it
    norm-consistent    the same after each ΔW is scaled to the mean norm of all (LiON-LoRA, arXiv:2507.05678)
    cat                Σ w ΔW, the factors side by side as they are; the rank is the sum of the ranks
    svd                Σ w ΔW, cut to a rank
    ties               TIES (arXiv:2306.01708): small values dropped, signs elected, then cut to a rank
    dare               DARE (arXiv:2311.03099): values dropped at random, the rest scaled up, then cut to a rank

The last two are PEFT's functions on the dense matrices. A layer that an adapter does not have counts as ΔW = 0.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.utils.merge_utils import dare_linear, ties

from fedlora.algebra import Factors

from .low_rank import NOTHING, Svd, added, balanced, frobenius, leading, relative_error, svd
from .peft_folder import Adapter, Target
from .written import NewTarget

DENSE = ("ties", "dare")
"""Ways that form the dense matrix of a layer."""


@dataclass(frozen=True)
class Way:
    """How adapters are combined.

    Attributes:
        how: one of the ways of the module's docstring.
        rank: the largest rank of the result; None for the way's own.
        density: share of the values that TIES and DARE keep.
        seed: seed of what DARE drops.
    """

    how: str
    rank: int | None = None
    density: float = 0.5
    seed: int = 0

    def default_weight(self, adapters: int) -> float:
        """Return the weight of each of a number of adapters: equal shares, but 1 for TIES, which averages itself."""
        return 1.0 if self.how == "ties" else 1.0 / adapters


@dataclass(frozen=True)
class Combined:
    """One layer of the result.

    Attributes:
        target: the new update.
        exact_rank: rank of the exact combination.
        error: what cutting to the rank and rounding took, as a share of the combination's Frobenius norm.
    """

    target: NewTarget
    exact_rank: int
    error: float


def combined(adapters: Sequence[Adapter], name: str, weights: Sequence[float], way: Way) -> Combined:
    """Combine the updates of one layer.

    Args:
        adapters: the adapters; at least one has the layer.
        name: the layer.
        weights: factor of each adapter's ΔW, taken as it is.
        way: how to combine.
    """
    having = [(adapter.targets[name], weight, adapter.factors(name))
              for adapter, weight in zip(adapters, weights, strict=True) if name in adapter.targets]
    dtype = having[0][0].dtype
    for target, _, _ in having:
        dtype = torch.promote_types(dtype, target.dtype)
    largest = max(target.rank for target, _, _ in having)
    parts = [(weight * target.scaling, factors) for target, weight, factors in having]
    is_embedding = having[0][0].is_embedding

    def made(factors: Factors) -> NewTarget:
        return NewTarget(factors, 1.0, dtype, is_embedding)

    if way.how in DENSE:
        dense = _dense(having, name, way)
        rank = way.rank or largest
        new = made(balanced(leading(dense, rank), rank))
        size, written = float(torch.linalg.matrix_norm(dense)), new.rounded()
        error = float(torch.linalg.matrix_norm(dense - written.B @ written.A)) / size if size else 0.0
        return Combined(new, min(dense.shape), error)
    if way.how == "norm-consistent":
        parts = _of_equal_norm(having)
    whole = added(parts)
    found = svd(whole)
    exact = _numerical_rank(found)
    rank = way.rank or (largest if way.how == "svd" else exact)
    new = made(whole if way.how == "cat" else balanced(found, rank if way.how == "svd" else min(rank, exact)))
    return Combined(new, exact, relative_error(whole, 1.0, new.rounded(), 1.0))


def _of_equal_norm(having: Sequence[tuple[Target, float, Factors]]) -> list[tuple[float, Factors]]:
    """Return the parts of the sum, each ΔW scaled to the mean of the norms. One that is 0 does not count."""
    norms = [abs(target.scaling) * frobenius(factors) for target, _, factors in having]
    present = [norm for norm in norms if norm]
    mean = sum(present) / len(present) if present else 0.0
    return [(weight * target.scaling * (mean / norm if norm else 0.0), factors)
            for (target, weight, factors), norm in zip(having, norms, strict=True)]


def _numerical_rank(found: Svd) -> int:
    """Return the number of singular values that are not 0 up to rounding; at least 1."""
    return max(1, int((found.S / found.S[0] > NOTHING).sum()))


def _dense(having: Sequence[tuple[Target, float, Factors]], name: str, way: Way) -> torch.Tensor:
    """Return the dense combination by PEFT's function, in float64."""
    matrices = [(target.scaling * (factors.B @ factors.A)).float() for target, _, factors in having]
    weights = torch.tensor([weight for _, weight, _ in having], dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # at a density of 1 PEFT says that it drops nothing
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{way.seed} {name}".encode()).digest()[:7], "big"))
        made: torch.Tensor = (ties if way.how == "ties" else dare_linear)(matrices, weights, way.density)
    return made.double()


def whole_tensors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Mapping[str, torch.Tensor]:
    """Return the means of the tensors that are not factors, such as a head's, by the weights' shares of their sum.

    Raises:
        ValueError: the sum of the weights is not positive.
    """
    if not adapters[0].others:
        return {}
    total = sum(weights)
    if total <= 0:
        raise ValueError(f"the weights add up to {total:g}, and the adapters' heads are averaged by shares of the sum; "
                         "give weights with a positive sum")
    found = {}
    for key in adapters[0].others:
        tensors = [adapter.tensor(key) for adapter in adapters]
        dtype = tensors[0].dtype
        mean = torch.zeros_like(tensors[0], dtype=torch.float64)
        for tensor, weight in zip(tensors, weights, strict=True):
            mean += weight / total * tensor.double()
            dtype = torch.promote_types(dtype, tensor.dtype)
        found[key] = mean.to(dtype)
    return found
