r"""The linear algebra of low-rank updates and weighted means, on plain tensors.

Shapes: B is (m, r) and A is (r, n), with m = d_out and n = d_in. The update is proportional to B A; the full (m, n)
product is never formed. Each function works in the dtype and on the device of its input. Use float64 where the exact
bits matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fedlora.plan import Tensors


@dataclass(frozen=True)
class Factors:
    """The two factors of a low-rank matrix B A.

    Attributes:
        B: (m, r).
        A: (r, n).
    """

    B: torch.Tensor
    A: torch.Tensor


def reorthogonalize(factors: Factors) -> Factors:
    r"""Rewrite B A as B' A', where A' has orthonormal rows, without changing the product.

    This is the refactorization of Lee et al., FedSVD (arXiv:2505.12805), in its thin form: with A^T = Q R, the SVD
    U S V^T of the small B R^T gives B' = U S and A' = V^T Q^T. It costs O((m + n) r^2).

        Case                         Result
        B = 0                        the input itself, because the SVD of 0 has arbitrary rows
        rank(B A) < r, A full rank   the last columns of B' are 0; the rows of A' stay in the row space of A
        rank(A) < r                  the rows of A' are orthonormal; those beyond rank(A) are arbitrary, and the
                                     columns of B' that belong to them are 0

    An SVD leaves signs open. They are fixed here: the entry of largest magnitude in each row of A' is positive.

    Args:
        factors: B (m, r) and A (r, n), with r <= min(m, n).

    Returns:
        B' with orthogonal columns of decreasing norm, and A' with orthonormal rows.

    Raises:
        ValueError: the ranks of B and A differ or exceed min(m, n).
    """
    B, A = factors.B, factors.A
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"B is {tuple(B.shape)} and A is {tuple(A.shape)}: their ranks differ. "
                         "Give every client the same --rank.")
    if A.shape[0] > min(B.shape[0], A.shape[1]):
        raise ValueError(f"rank {A.shape[0]} exceeds min(d_out, d_in) = {min(B.shape[0], A.shape[1])}: A cannot have "
                         "orthonormal rows. Choose a smaller --rank.")
    if not B.any():
        return factors
    Q, R = torch.linalg.qr(A.T)  # (n, r), (r, r)
    U, S, Vh = torch.linalg.svd(B @ R.T, full_matrices=False)  # (m, r), (r,), (r, r)
    rows = Vh @ Q.T
    signs = row_signs(rows)
    return Factors(B=U * (S * signs), A=rows * signs[:, None])


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    r"""Return the best approximation of B A by a product of smaller rank, and the L2 norm of what it leaves out.

    With B = Q_B R_B and A^T = Q_A R_A, the SVD of the small R_B R_A^T gives that of B A, at a cost of O((m + n) k^2).

    Args:
        factors: B (m, k) and A (k, n).
        rank: the largest rank of the result, at least 1.

    Returns:
        B' (m, p) = U S and A' (p, n) = V^T with p <= rank, signs fixed as in `reorthogonalize`; and the root of the sum
        of squares of all singular values that were left out (Frobenius norm).
    """
    Q_B, R_B = torch.linalg.qr(factors.B)
    Q_A, R_A = torch.linalg.qr(factors.A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    rows = (Vh @ Q_A.T)[:rank]
    signs = row_signs(rows)
    return Factors(B=(Q_B @ U)[:, :rank] * (S[:rank] * signs), A=rows * signs[:, None]), float(S[rank:].norm())


def row_signs(matrix: torch.Tensor) -> torch.Tensor:
    """Return the sign (1 or -1) of each row's entry of largest magnitude: (r, n) to (r,)."""
    largest = matrix.gather(1, matrix.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(largest < 0, -1.0, 1.0).to(matrix.dtype)


def orthonormal_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the row space, signs fixed as in `reorthogonalize`: (r, n) to (r, n), r <= n.

    If the entries of the matrix are independent Gaussians, the basis is uniformly distributed up to its signs.
    """
    rows: torch.Tensor = torch.linalg.qr(matrix.T)[0].T
    return rows * row_signs(rows)[:, None]


def leading_factors(matrix: torch.Tensor, rank: int) -> Factors:
    """Return the leading singular vectors of a matrix, in float64.

    They are computed from the eigenvectors of the smaller Gram matrix. For leading vectors that is as accurate as an
    SVD, and several times faster.

    Args:
        matrix: (m, n).
        rank: r, the number of singular vectors to return.

    Returns:
        B (m, r), with the left singular vectors as columns, and A (r, n), with the right ones as rows.

    Raises:
        ValueError: rank exceeds min(m, n).
    """
    if rank > min(matrix.shape):
        raise ValueError(f"rank {rank} exceeds the smaller side of a {tuple(matrix.shape)} weight; choose a smaller "
                         "--rank")
    W = matrix.double()
    if W.shape[0] > W.shape[1]:
        transposed = leading_factors(W.T, rank)
        signs = row_signs(transposed.B.T)
        return Factors(B=transposed.A.T * signs, A=transposed.B.T * signs[:, None])
    left = torch.linalg.eigh(W @ W.T)[1].flip(1)[:, :rank]  # (m, r), largest eigenvalue first
    Q, R = torch.linalg.qr(W.T @ left)  # the columns are orthogonal already, so R is diagonal up to rounding
    rows = Q.T * torch.where(R.diagonal() < 0, -1.0, 1.0).double()[:, None]
    signs = row_signs(rows)
    return Factors(B=left * signs, A=rows * signs[:, None])


class WeightedMean:
    """A running weighted mean of sets of named tensors.

    Sets are added one at a time, so memory holds one float64 copy however many there are. The bits of the result depend
    on the order of the calls to `add`: always add in the same order.
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._total = 0.0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one set of tensors to the mean.

        Args:
            tensors: arrays with the same names and shapes in every call.
            weight: positive and finite. The mean divides by the sum of the weights.

        Raises:
            ValueError: the names or shapes differ from earlier calls, or the weight is not positive and finite. The
                mean is unchanged then.
        """
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight is {weight}; it must be positive and finite")
        if self._sums and {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in self._sums.items()}:
            raise ValueError("the tensors' names or shapes differ from those added before; a mean needs the same ones")
        if not self._sums:
            self._sums = {name: np.zeros(array.shape, np.float64) for name, array in tensors.items()}
        for name, array in tensors.items():
            self._sums[name] += array if weight == 1 else np.multiply(array, weight, dtype=np.float64)
        self._total += weight

    def result(self) -> dict[str, np.ndarray]:
        """Return the mean of all sets added so far, as float32 arrays.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sums:
            raise ValueError("the mean of no tensors is undefined; add at least one set")
        return {name: (total / self._total).astype(np.float32) for name, total in self._sums.items()}


def weighted_mean(sets: Iterable[Tensors], weights: Iterable[float]) -> dict[str, np.ndarray]:
    """Return the weighted mean of sets of named tensors, as `WeightedMean` does in this order.

    Raises:
        ValueError: the sets' names or shapes differ, there is no set, or a weight is not positive and finite.
    """
    mean = WeightedMean()
    for tensors, weight in zip(sets, weights, strict=True):
        mean.add(tensors, weight)
    return mean.result()
