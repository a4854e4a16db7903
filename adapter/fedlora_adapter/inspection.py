"""Figures of an adapter: how large its updates are, of what rank, and how they lie to its base and to other adapters.

Intruder dimensions are those of Shuttleworth et al. (arXiv:2410.21228): leading singular vectors of W + ΔW that are
like none of W's. They are named, and can be scaled down as in that paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from fedlora.algebra import Factors

from .base_weights import BaseWeights
from .low_rank import MOST_EXACT, NOTHING, Svd, added, balanced, entropy_rank, inner, leading, relative_error, svd
from .peft_folder import Adapter, Target
from .written import NewTarget

COMPARED = 256
"""Leading directions of a large base weight that intruders are compared with; smaller weights have all compared."""


@dataclass(frozen=True)
class Search:
    """How intruder dimensions are looked for.

    Attributes:
        top: number of leading singular vectors of W + ΔW that are looked at.
        threshold: a vector is an intruder if its cosine to every singular vector of W is below this.
        all_directions: compare with all of W's, however large W is.
    """

    top: int = 10
    threshold: float = 0.5
    all_directions: bool = False


@dataclass(frozen=True)
class BeforeAndAfter:
    """A base weight beside its update.

    Attributes:
        frobenius: Frobenius norm of W.
        spectral: largest singular value of W.
        compared: number of W's singular vectors that were compared with.
        looked_at: number of singular vectors of W + ΔW that were looked at.
        intruders: those of them that are intruders, with their singular values.
    """

    frobenius: float
    spectral: float
    compared: int
    looked_at: int
    intruders: Svd


@dataclass(frozen=True)
class Figures:
    """Figures of one target's update, ΔW.

    Attributes:
        target: the target.
        frobenius: Frobenius norm of ΔW.
        spectral: largest singular value of ΔW.
        stable_rank: (Frobenius / spectral norm)²; 0 if ΔW is 0.
        effective_rank: exponential of the entropy of ΔW's singular values; 0 if ΔW is 0.
        base: the same of the base's weight; None if no base was given.
    """

    target: Target
    frobenius: float
    spectral: float
    stable_rank: float
    effective_rank: float
    base: BeforeAndAfter | None

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        found: dict[str, object] = {
            "target": self.target.name, "shape": [self.target.d_out, self.target.d_in], "rank": self.target.rank,
            "scaling": self.target.scaling, "frobenius": self.frobenius, "spectral": self.spectral,
            "stable_rank": self.stable_rank, "effective_rank": self.effective_rank}
        if self.base is not None:
            found["base"] = {"frobenius": self.base.frobenius, "spectral": self.base.spectral,
                             "intruders": len(self.base.intruders.S), "looked_at": self.base.looked_at,
                             "compared_with": self.base.compared}
        return found


def figures(adapter: Adapter, name: str, base: BaseWeights | None, search: Search) -> Figures:
    """Return the figures of one target.

    Args:
        adapter: the adapter.
        name: the target's name.
        base: the base model's weights; None to leave them out.
        search: how to look for intruder dimensions.

    Raises:
        ValueError: the adapter's factors are not finite, or the base does not fit.
    """
    target, factors = adapter.targets[name], adapter.factors(name)
    S = svd(factors).S * abs(target.scaling)
    spectral, frobenius = float(S[0]), math.sqrt(float(S.square().sum()))
    compared = None if base is None else _beside(base.weight(adapter, target), factors, target.scaling, search)
    return Figures(target, frobenius, spectral, (frobenius / spectral) ** 2 if spectral else 0.0, entropy_rank(S),
                   compared)


def _beside(W: torch.Tensor, factors: Factors, scaling: float, search: Search) -> BeforeAndAfter:
    every = search.all_directions or min(W.shape) <= MOST_EXACT
    own = leading(W, min(W.shape) if every else COMPARED, exact=search.all_directions)
    tuned = leading(W + scaling * (factors.B @ factors.A), search.top, exact=search.all_directions)
    nearest = (tuned.U.T @ own.U).abs().max(dim=1).values
    chosen = (nearest < search.threshold) & (tuned.S > 0)
    return BeforeAndAfter(float(torch.linalg.matrix_norm(W)), float(own.S[0]), len(own.S), len(tuned.S),
                          Svd(tuned.U[:, chosen], tuned.S[chosen], tuned.Vh[chosen]))


def scaled_intruders(adapter: Adapter, found: Figures, factor: float) -> tuple[NewTarget, float]:
    """Return a target's update with the intruders of W + ΔW scaled by `factor`, at its rank.

    The change is (factor − 1) Σ σ u vᵀ over the intruders (arXiv:2410.21228). The sum has a higher rank and is cut back
    to the target's by SVD.

    Args:
        adapter: the adapter.
        found: the target's figures beside its base.
        factor: 1 changes nothing, 0 takes the intruders away.

    Returns:
        The new update, and the share of it in the Frobenius norm that the cut and rounding took.
    """
    target, factors = found.target, adapter.factors(found.target.name)
    if found.base is None or not len(found.base.intruders.S) or factor == 1:
        return NewTarget(factors, target.scaling, target.dtype, target.is_embedding), 0.0
    one = found.base.intruders
    wanted = added([(1.0, factors), ((factor - 1) / target.scaling, Factors(B=one.U * one.S, A=one.Vh))])
    new = NewTarget(balanced(svd(wanted), target.rank), target.scaling, target.dtype, target.is_embedding)
    return new, relative_error(wanted, target.scaling, new.rounded(), target.scaling)


@dataclass(frozen=True)
class Overlap:
    """How the updates of two adapters lie to each other in one layer.

    Attributes:
        target: the layer.
        cosine: cosine between the two ΔW.
        rows: share of the smaller row space (inputs) that lies in the other: the mean squared cosine of the principal
            angles, 0 to 1.
        columns: the same of the column spaces (outputs).
        rows_by_chance: what random spaces of these dimensions have.
        columns_by_chance: what random spaces of these dimensions have.
        largest_row_cosine: cosine of the smallest principal angle between the row spaces.
        largest_column_cosine: the same of the column spaces.
    """

    target: str
    cosine: float
    rows: float
    columns: float
    rows_by_chance: float
    columns_by_chance: float
    largest_row_cosine: float
    largest_column_cosine: float


def overlap(one: Adapter, other: Adapter, name: str) -> Overlap | None:
    """Return how two adapters' updates of a layer lie to each other; None if one of them is 0.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = one.targets[name], other.targets[name]
    if (a.d_out, a.d_in) != (b.d_out, b.d_in):
        raise ValueError(f"{name} has shape {a.d_out} × {a.d_in} in {one.path} and {b.d_out} × {b.d_in} in "
                         f"{other.path}: the adapters are of different base models")
    first, second = one.factors(name), other.factors(name)
    found = svd(first), svd(second)
    if not float(found[0].S[0]) or not float(found[1].S[0]):
        return None
    sign = math.copysign(1.0, a.scaling * b.scaling)
    size = math.prod(math.sqrt(float(part.S.square().sum())) for part in found)
    spans = [part.S / part.S[0] > NOTHING for part in found]
    rows = torch.linalg.svdvals(found[0].Vh[spans[0]] @ found[1].Vh[spans[1]].T)
    columns = torch.linalg.svdvals(found[0].U[:, spans[0]].T @ found[1].U[:, spans[1]])
    larger = max(int(span.sum()) for span in spans)
    return Overlap(name, sign * inner(first, second) / size, float(rows.square().mean()),
                   float(columns.square().mean()), larger / a.d_in, larger / a.d_out, float(rows[0]),
                   float(columns[0]))


def mean_overlap(overlaps: Sequence[Overlap]) -> Mapping[str, float]:
    """Return the means of all figures over the layers."""
    names = ("cosine", "rows", "columns", "rows_by_chance", "columns_by_chance", "largest_row_cosine",
             "largest_column_cosine")
    return {name: fmean(getattr(one, name) for one in overlaps) for name in names}
