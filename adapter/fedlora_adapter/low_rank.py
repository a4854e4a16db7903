"""The algebra of low-rank products B A, in float64 and without ever forming them.

B is (m, r) and A is (r, n). Everything costs O((m + n) r²).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fedlora.algebra import Factors, leading_factors

MOST_EXACT = 2048
"""Largest smaller side of a matrix whose singular vectors are computed exactly; larger ones by random projection."""

_POWER_STEPS, _SPARE = 4, 16
"""Steps and spare directions of the randomised method of Halko, Martinsson and Tropp (arXiv:0909.4061)."""

NOTHING = 1e-6
"""A singular value below this share of the largest counts as zero: what rounding to float32 leaves."""


class Svd(NamedTuple):
    """A thin singular value decomposition, U diag(S) Vh.

    Attributes:
        U: (m, k), orthonormal columns.
        S: (k,), in falling order.
        Vh: (k, n), orthonormal rows.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def svd(factors: Factors) -> Svd:
    """Return the singular value decomposition of B A, by the QR of each factor; k = min(m, r, n)."""
    left, upper = torch.linalg.qr(factors.B)
    right, lower = torch.linalg.qr(factors.A.T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Svd(left @ U, S, Vh @ right.T)


def balanced(found: Svd, rank: int) -> Factors:
    """Return factors of the leading part of a decomposition, the singular values shared equally between B and A.

    If there are fewer singular values than `rank`, the further columns of B and rows of A are zero.
    """
    root = found.S[:rank].sqrt()
    B, A = found.U[:, :rank] * root, found.Vh[:rank] * root[:, None]
    if lacking := rank - len(root):
        B = torch.cat((B, B.new_zeros(B.shape[0], lacking)), dim=1)
        A = torch.cat((A, A.new_zeros(lacking, A.shape[1])))
    return Factors(B=B, A=A)


def added(parts: Sequence[tuple[float, Factors]]) -> Factors:
    """Return factors of the weighted sum of products: those of all parts side by side, the weights in B."""
    return Factors(B=torch.cat([weight * part.B for weight, part in parts], dim=1),
                   A=torch.cat([part.A for _, part in parts]))


def frobenius(factors: Factors) -> float:
    """Return the Frobenius norm of B A."""
    return math.sqrt(float(svd(factors).S.square().sum()))


def inner(one: Factors, other: Factors) -> float:
    """Return the inner product of two products of equal shape, the sum over all entries of one times the other."""
    return float(((one.B.T @ other.B) * (one.A @ other.A.T)).sum())


def relative_error(true: Factors, scaling: float, written: Factors, written_scaling: float) -> float:
    """Return the Frobenius norm of the difference of two scaled products as a share of the first's; 0 if both are 0."""
    size = abs(scaling) * frobenius(true)
    difference = frobenius(added([(scaling, true), (-written_scaling, written)]))
    return difference / size if size else (0.0 if difference == 0 else math.inf)


def entropy_rank(S: torch.Tensor) -> float:
    """Return the effective rank of Roy and Vetterli: the exponential of the entropy of the normalised values."""
    if not float(S.sum()):
        return 0.0
    share = S[S > 0] / S.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def leading(matrix: torch.Tensor, count: int, *, exact: bool = False) -> Svd:
    """Return the leading singular triples of a matrix, in float64.

    They are exact if the smaller side is at most `MOST_EXACT`. Otherwise they are found by random projection, from the
    same draws each time.

    Args:
        matrix: (m, n).
        count: how many; at most min(m, n) are returned.
        exact: compute larger matrices exactly too, which takes minutes.
    """
    count = min(count, *matrix.shape)
    W = matrix.double()
    if exact or min(W.shape) <= MOST_EXACT:
        found = leading_factors(W, count)
        S = (found.B * (W @ found.A.T)).sum(dim=0).abs()
        return Svd(found.B, S, found.A)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(W, q=min(count + _SPARE, *W.shape), niter=_POWER_STEPS)
    return Svd(U[:, :count], S[:count], V[:, :count].T)
