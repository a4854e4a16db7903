"""Adapters of a smaller rank: the best one of that rank, or the first rows and columns of the factors."""

from __future__ import annotations

from fedlora.algebra import Factors

from .low_rank import balanced, relative_error, svd
from .peft_folder import Adapter
from .written import NewTarget

WAYS = ("svd", "prefix")


def resized(adapter: Adapter, name: str, rank: int, by: str) -> tuple[NewTarget, float]:
    """Return a target's update at a rank, and its error: the relative difference in the Frobenius norm.

    Args:
        adapter: the adapter.
        name: the target's name.
        rank: the new rank. A target of no larger rank is left as it is.
        by: "svd" for the best approximation of B A, found from the QR of the factors; "prefix" for the first `rank`
            columns of B and rows of A, which are adapters of their own if the training saw to it, as DyLoRA's does
            (arXiv:2210.07558). The scale stays.
    """
    target, factors = adapter.targets[name], adapter.factors(name)
    if target.rank <= rank:
        return NewTarget(factors, target.scaling, target.dtype, target.is_embedding), 0.0
    smaller = balanced(svd(factors), rank) if by == "svd" else Factors(B=factors.B[:, :rank], A=factors.A[:rank])
    new = NewTarget(smaller, target.scaling, target.dtype, target.is_embedding)
    return new, relative_error(factors, target.scaling, new.rounded(), new.scaling)
