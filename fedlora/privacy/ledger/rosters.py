"""Rosters as the ledger keeps them: what the members of a run's secure sums do for one client's records.

Unit and relation are those of `fedlora.privacy.accounting`: one unit of this client, zero-out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.plan.limits import LEAST_MEMBERS, MOST_MEMBERS, sum_threshold
from fedlora.privacy.mechanisms.distributed_gaussian import SumNoise, honest, sum_sensitivity


@dataclass(frozen=True)
class RosterFacts:
    """One roster of a run, as this client checked it before it trained under it.

    Attributes:
        digest: SHA-256 of all that the roster says, 64 hexadecimal digits.
        members: n.
        colluding: t, how many members may tell the server what they know without the sums' promise changing.
        noise_multiplier: the noise of the sums by honest members, over the sensitivity of this client's encoded sum.
        deviation: standard deviation, in units of the grid, of the noise that each member adds at least.
        step: one unit of the grid, as a real value.
        clip_norm: the plan's, for which the grid was made and to which any member may clip.
        values: the most values in a vector.
        pinned: whether the owner's policy names the key of every member. Otherwise the certificate authority alone
            says who they are, and whoever runs it could have enrolled false ones.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    digest: str
    members: int
    colluding: int
    noise_multiplier: float
    deviation: float
    step: float
    clip_norm: float
    values: int
    pinned: bool

    def __post_init__(self) -> None:
        if len(self.digest) != 64 or set(self.digest) - set("0123456789abcdef"):
            raise ValueError(f"a roster's digest is {self.digest!r}; it must be 64 lower-case hexadecimal digits")
        if not LEAST_MEMBERS <= self.members <= MOST_MEMBERS:
            raise ValueError(f"a roster has {self.members} members; it must have {LEAST_MEMBERS} to {MOST_MEMBERS}")
        if not 0 <= self.colluding <= self.members - sum_threshold(self.members):
            raise ValueError(f"a roster of {self.members} members allows for {self.colluding} colluding ones; it must "
                             f"be 0 to {self.members - sum_threshold(self.members)}")
        for name in ("noise_multiplier", "deviation", "step", "clip_norm", "values"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"a roster's {name} is {value!r}; it must be positive and finite")

    @property
    def honest(self) -> int:
        """The fewest shares of noise by honest members in a sum that can be opened, h = T − t."""
        return honest(self.members, self.colluding)

    def noise(self, sampling_rate: float) -> SumNoise:
        """Return the mechanism that this client's records meet in the sums.

        Args:
            sampling_rate: this client's, the probability with which each unit enters a step.
        """
        return SumNoise(self.noise_multiplier, sampling_rate, self.deviation, self.honest, self.values,
                        max(1.0, self.noise_multiplier / self.most_noise(self.clip_norm)))

    def most_noise(self, clip_norm: float) -> float:
        """Return the noise multiplier of the sums for a client that clips to a norm."""
        return math.sqrt(self.honest) * self.deviation / sum_sensitivity(clip_norm, self.step, self.values)


def aggregate_epsilon(rosters: Sequence[RosterFacts], sampling_rate: float, delta: float, rounds: int, *,
                      clients: int = 1) -> float | None:
    """Return the largest ε at δ of a number of sums under any of the rosters, towards whoever sees the sums alone.

    It bounds sums under several of them too.

    Args:
        rosters: the rosters that this client took part in.
        sampling_rate: the probability with which each unit enters a step.
        delta: δ.
        rounds: number of sums.
        clients: the number of clients that hold a unit of the same person, of equal sampling rates.

    Returns:
        None if nothing may be stated: no roster is known, the members of one are not pinned, or its grid is too coarse
        for this δ.
    """
    if not rosters or not all(roster.pinned for roster in rosters):
        return None
    try:
        return max(roster.noise(sampling_rate).epsilon(delta, rounds, clients=clients) for roster in rosters)
    except ValueError:
        return None
