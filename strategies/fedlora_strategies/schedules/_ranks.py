"""What the schedules that change ranks share: how many ranks of each layer are active, and a score of each.

The active ranks of a layer are its first ones: columns 1 … k of B (d_out, r) and rows 1 … k of A (r, d_in). The columns
of B behind them are 0, so that the server's model is the one that clients train. The factor on the update is alpha / r
throughout, so that a change of k alone changes no ΔW.

    score       z_mj = ‖d_mj‖² / (d_out ν),   d_mj: the change of column j of B in layer m since the last decision
    noise       ν: the median of ‖d_mj‖² / d_out over all active columns

If the columns change by noise of one variance, ν is that variance but for the median's share below the mean,
2 / (3 d_out), and z has mean 1 and standard deviation √(2 / d_out). The server does not know the variance itself: it
follows from the clients' optimizers and from noise multipliers that not every client announces.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Tensors

from .constant import Constant

ACTIVE, DECISIONS = "ranks", "decisions"
"""The arrays in a schedule's memory that hold the number of active ranks of each site, in the layout's order, and the
number of decisions so far."""


@dataclass(frozen=True)
class Decided(Constant):
    """A schedule that changes the number of active ranks after two rounds.

    Attributes:
        total: The number of active ranks of all layers together after the last decision.
        first: The round after which it decides first.
        last: The round after which it decides for the last time.
    """

    total: int = 0
    first: int = 1
    last: int = 2

    @abstractmethod
    def begins_with(self, rank: int) -> int:
        """Return the number of active ranks that a layer of this rank begins with."""

    @abstractmethod
    def decide(self, scores: list[np.ndarray], layout: AdapterLayout, *, last: bool) -> list[np.ndarray]:
        """Return the ranks that are active from now on.

        Args:
            scores: The score of each active rank, for each site.
            layout: The adapters' tensors.
            last: Whether no decision follows.

        Returns:
            For each site the indices of its active ranks, ascending. A new one has the next higher index.
        """

    @override
    def check(self, layout: AdapterLayout) -> None:
        most = sum(site.rank for site in layout.sites)
        check_narrows(self, layout)
        if not len(layout.sites) <= self.total <= most:
            raise ValueError(f"--ranks {self.form.replace('TOTAL', str(self.total))}: the {len(layout.sites)} adapted "
                             f"layers have {most} ranks together, and each keeps one at least; name a TOTAL from "
                             f"{len(layout.sites)} to {most}, or choose another --rank")

    @override
    def begin(self, layout: AdapterLayout, state: Tensors) -> Tensors:
        if not layout.family.narrows:
            return {}
        ranks = np.array([self.begins_with(site.rank) for site in layout.sites], np.int64)
        return {ACTIVE: ranks, DECISIONS: np.zeros(1, np.int64), **_before(layout, state)}

    @override
    def prefixes(self, round: int, layout: AdapterLayout, own: Tensors, rng: np.random.Generator) -> Mapping[str, int]:
        return active_ranks(layout, own)

    @override
    def between(self, state: Tensors, layout: AdapterLayout, own: Tensors, round: int,
                rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        due = (round >= self.first) + (round >= self.last)
        if not own or due <= own[DECISIONS][0]:  # a round without usable uploads decides nothing; the next one does
            return state, own
        now = own[ACTIVE]
        scores = scored([state[f"{site.name}.B"][:, :rank] - own[f"before/{site.name}"][:, :rank]
                         for site, rank in zip(layout.sites, now, strict=True)])
        kept = self.decide(scores, layout, last=round >= self.last)
        state = {**state}
        for site, indices, rank in zip(layout.sites, kept, now, strict=True):
            state |= _first(state, site.name, indices, rank)
        return state, {ACTIVE: np.array([len(indices) for indices in kept], np.int64),
                       DECISIONS: np.array([due], np.int64), **_before(layout, state)}


def check_narrows(schedule: Constant, layout: AdapterLayout) -> None:
    """Check that layers can be trained in their first ranks alone.

    Raises:
        ValueError: The adapter family does not allow it.
    """
    if not layout.family.narrows:
        raise ValueError(f"--ranks {schedule.form} needs adapters of the family lora or frozen-a, and this strategy's "
                         f"are {layout.family.name}; choose --strategy ffa-lora or fedavg-lora")


def active_ranks(layout: AdapterLayout, own: Tensors) -> dict[str, int]:
    """Return site → number of active ranks, for the sites that have others.

    Args:
        layout: The adapters' tensors.
        own: The memory of the schedule; any, also of one that leaves ranks alone.
    """
    ranks = own.get(ACTIVE, ())
    return {site.name: int(rank) for site, rank in zip(layout.sites, ranks, strict=False) if rank != site.rank}


def scored(changes: list[np.ndarray]) -> list[np.ndarray]:
    """Return the score z of each active rank.

    Args:
        changes: For each site [d_out, k] the change of B's active columns.

    Returns:
        For each site [k] scores, float64. All are 1 if at least half of the columns have not changed.
    """
    means = [np.mean(change.astype(np.float64) ** 2, axis=0) for change in changes]
    noise = float(np.median(np.concatenate(means)))
    return [mean / noise if noise > 0 else np.ones(len(mean)) for mean in means]


def noise_limit(d_out: int) -> float:
    """Return the score below which two standard deviations of noise explain a column of this length."""
    return 1 + 2 * math.sqrt(2 / d_out)


def _before(layout: AdapterLayout, state: Tensors) -> dict[str, np.ndarray]:
    return {f"before/{site.name}": state[f"{site.name}.B"] for site in layout.sites}


def _first(state: Tensors, site: str, kept: np.ndarray, ranks: int) -> dict[str, np.ndarray]:
    """Return the factors with the kept ranks first, and the columns of B behind them 0.

    Args:
        state: The state.
        site: The site's name.
        kept: The indices of the ranks to keep, ascending.
        ranks: How many were active before.
    """
    B, A = (state[f"{site}.{factor}"] for factor in "BA")
    retired = np.setdiff1d(np.arange(ranks), kept)
    if not len(retired):
        return {}
    order = np.concatenate([kept, retired, np.arange(ranks, len(A))])
    B = B[:, order]
    B[:, len(kept):] = 0
    return {f"{site}.B": np.ascontiguousarray(B), f"{site}.A": np.ascontiguousarray(A[order])}
