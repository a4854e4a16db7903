"""The stack beside an adapter (family `lora-stack`): what is put into it, and the rows that take a folded row's place.

    fold     D C ← D C + B A: in empty slots as it is; where too few are empty, the best approximation of all that the
             stack shall hold, by a thin SVD
    fresh    random rows, orthogonal to the rows that stay
    exchange both, for some directions of a layer

A stack of min(d_out, d_in) slots holds every update exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from fedlora.adapters import AdapterLayout
from fedlora.algebra import Factors, truncated
from fedlora.plan import Tensors

log = logging.getLogger(__name__)

UNTOLD = 1e-6
"""Largest share of an update that may be lost without a word: rounding."""


@runtime_checkable
class Stacking(Protocol):
    """A part of the server step that puts something into the stack."""

    def slots(self, rank: int, rounds: int) -> int:
        """Return how many slots a layer's stack needs for a run.

        Args:
            rank: The largest rank of a layer.
            rounds: The number of planned rounds.
        """


class Folded(NamedTuple):
    """The result of putting an update into a stack.

    Attributes:
        stack: The next C and D by name, float32.
        lost: The part that did not fit, as a share of all that the stack should hold (Frobenius norms).
    """

    stack: Tensors
    lost: float


def check_stack(layout: AdapterLayout, who: str) -> None:
    """Check that adapters have two factors and a stack, and no more rows than can be orthogonal.

    Args:
        layout: The adapters' tensors.
        who: The name of what needs the stack, for the message.

    Raises:
        ValueError: They have none, or the rank is too large.
    """
    names, needed = {spec.name for spec in layout.state}, (f"{site}.{of}" for site in layout.modules for of in "ABCD")
    if lacking := [name for name in needed if name not in names]:
        raise ValueError(f"{who} needs adapters of the family 'lora-stack', and those of the family "
                         f"{layout.family.name!r} have no {lacking[0]!r}; name that family in the recipe")
    for site in layout.sites:
        if site.rank > min(site.d_out, site.d_in):
            raise ValueError(f"rank {site.rank} exceeds the smaller side of {site.name}, {min(site.d_out, site.d_in)}: "
                             "A cannot have orthogonal rows. Choose a smaller --rank")


@np.errstate(over="ignore")  # the caller of the server step checks that the state is finite
def fold(state: Tensors, site: str, B: np.ndarray, A: np.ndarray) -> Folded:
    """Add the update B A to a site's stack. Nothing is written to the state.

    Args:
        state: The state.
        site: The site's name.
        B: (d_out, k) columns.
        A: (k, d_in) rows.
    """
    C, D = state[f"{site}.C"].copy(), state[f"{site}.D"].copy()
    empty = np.flatnonzero(~(D.any(axis=0) & C.any(axis=1)))
    lost = 0.0
    if len(empty) >= len(A):
        chosen = empty[:len(A)]
        D[:, chosen], C[chosen] = B, A
    else:
        whole = Factors(B=_wide(np.hstack([D, B])), A=_wide(np.vstack([C, A])))
        best, dropped = truncated(whole, len(C))
        kept = float(best.B.norm())  # the rows of A are orthonormal
        lost = dropped / (kept**2 + dropped**2) ** 0.5 if dropped else 0.0
        C[:], D[:] = 0.0, 0.0
        C[:len(best.A)], D[:, :len(best.A)] = best.A.numpy(), best.B.numpy()
    return Folded({f"{site}.C": C, f"{site}.D": D}, lost)


def exchange(state: dict[str, np.ndarray], site: str, chosen: np.ndarray, lengths: np.ndarray,
             rng: np.random.Generator) -> Folded | None:
    """Put some of a site's directions into its stack, and new ones in their place: B A + D C stays as it is.

    Args:
        state: The state. The site's A, B, C and D are replaced in it.
        site: The site's name.
        chosen: The indices of the directions: columns of B and rows of A.
        lengths: The L2 norms of the new rows of A, one for each of them.
        rng: The random numbers.

    Returns:
        What became of the stack; None if the directions have learned nothing, so that they stay.
    """
    B, A = state[f"{site}.B"].copy(), state[f"{site}.A"].copy()
    drawn = fresh(np.delete(A, chosen, axis=0), lengths, rng)
    if not B[:, chosen].any():
        return None
    folded = fold(state, site, B[:, chosen], A[chosen])
    B[:, chosen], A[chosen] = 0.0, drawn
    state |= {**folded.stack, f"{site}.B": B, f"{site}.A": A}
    return folded


def tell(folded: Iterable[Folded]) -> None:
    """Warn if a stack could not hold everything.

    Args:
        folded: What became of the stacks in a round.
    """
    worst = max(folded, key=lambda one: one.lost, default=None)
    if worst is not None and worst.lost > UNTOLD:
        slots = min(map(min, (array.shape for array in worst.stack.values())))
        log.warning("A stack of %d slots cannot hold all that the server put into it in this round: %.2g %% of it (L2 "
                    "norm) was left out. Give it more with --family-options slots=N.", slots, 100 * worst.lost)


def fresh(kept: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw rows that are orthogonal to each other and to the rows that stay.

    Args:
        kept: (k, d_in) rows that stay, linearly independent.
        lengths: (n,) L2 norms of the new rows, with k + n <= d_in.
        rng: The random numbers.

    Returns:
        (n, d_in) rows, float64; uniform among those directions, up to signs.
    """
    drawn = rng.standard_normal((len(lengths), kept.shape[1]))
    # Q begins with a basis of the rows that stay, so what follows is orthogonal to them
    Q = np.linalg.qr(np.vstack([kept.astype(np.float64), drawn]).T)[0][:, len(kept):]
    rows: np.ndarray = lengths[:, None] * Q.T
    return rows


def _wide(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float64))
