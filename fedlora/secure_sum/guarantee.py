"""What a client's records are promised towards whoever sees the sums alone.

Every sum that can be opened holds the noise of h = T − t honest members at least, each with a standard deviation of
`roster.noise` units of the grid before rounding. For a client with clip norm C_i and sampling rate q_i that is the
subsampled Gaussian mechanism with the noise multiplier

    √h · noise / (C_i / step + √d),

where the denominator is the sensitivity of its encoded sum of d values. It rests on the assumption that is told with
it: at least n − t members of the roster are whom they claim to be and keep to the protocol. Someone who sees a client's
upload unmasked is held off by the client's own noise alone, which the local ε counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora.privacy.accounting import Accountant
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.rounding import rounding_delta

ROUNDING_SHARE = 0.01
"""Share of δ that is set aside for what rounding to the grid changes."""

_INTERVAL = 1e-3  # of dp-accounting's grid of privacy losses; its estimate is from above, and a finer one is lower


@dataclass(frozen=True)
class SumGuarantee:
    """The mechanism that a client's records meet in the sums of a run.

    Attributes:
        noise_multiplier: the sum's noise by honest members, over the client's sensitivity.
        sampling_rate: q_i, the probability with which each unit enters a step.
        deviation: standard deviation of one member's noise before rounding, in units of the grid.
        honest: h.
        values: d, the number of values in a vector.
    """

    noise_multiplier: float
    sampling_rate: float
    deviation: float
    honest: int
    values: int

    @classmethod
    def of(cls, roster: Roster, *, clip_norm: float, sampling_rate: float) -> SumGuarantee:
        """Return the guarantee that a roster gives to one of its members.

        Args:
            roster: the roster.
            clip_norm: the client's own clip norm, at most the plan's.
            sampling_rate: the client's own sampling rate.

        Raises:
            ValueError: the clip norm is above the plan's, which the grid was made for.
        """
        if clip_norm > roster.grid.clip_norm:
            raise ValueError(f"clip_norm is {clip_norm:g}, above the {roster.grid.clip_norm:g} of the roster's grid")
        sensitivity = roster.grid.sensitivity(roster.values, clip_norm)
        return cls(math.sqrt(roster.honest) * roster.noise / sensitivity, sampling_rate, roster.noise, roster.honest,
                   roster.values)

    def epsilon(self, delta: float, rounds: int, *, clients: int = 1) -> float:
        """Return an upper bound on ε at δ of a run's sums, for one unit under the zero-out relation.

        If one person's records are at several clients, a step moves the sum once for each of them that it samples. The
        shift of the Gaussian is then 0 to m lengths with binomial probabilities, which dp-accounting's mixture of
        Gaussians bounds.

        Args:
            delta: δ. A hundredth of it is set aside for the rounding.
            rounds: number of sums, each of one step of the client.
            clients: m, the number of clients that hold a unit of the same person, of equal sampling rates.

        Raises:
            ValueError: the grid is too coarse for this δ.
        """
        if not rounds:
            return 0.0
        own = (1 - ROUNDING_SHARE) * delta
        epsilon = self._of_one(own, rounds) if clients == 1 else self._of_several(own, rounds, clients)
        added = rounding_delta(self.deviation, self.honest, coordinates=self.values * rounds, epsilon=epsilon)
        if not added <= ROUNDING_SHARE * delta:
            raise ValueError(f"rounding to the grid would add {added:.2g} to δ = {delta:g} at ε = {epsilon:.4g}; "
                             "choose a finer grid or more noise")
        return epsilon

    def _of_one(self, delta: float, rounds: int) -> float:
        accountant = Accountant()
        accountant.add(self.noise_multiplier, self.sampling_rate, rounds)
        return accountant.epsilon(delta)

    def _of_several(self, delta: float, rounds: int, clients: int) -> float:
        from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

        q = self.sampling_rate
        probabilities = [math.comb(clients, k) * q**k * (1 - q)**(clients - k) for k in range(clients + 1)]
        step = from_mixture_gaussian_mechanism(self.noise_multiplier, list(range(clients + 1)), probabilities,
                                               value_discretization_interval=_INTERVAL)
        return float(step.self_compose(rounds).get_epsilon_for_delta(delta))


def least_noise(multiplier: float, *, clip_norm: float, step: float, values: int) -> float:
    """Return the standard deviation, in units of the grid, with which a client's own noise multiplier holds.

    It is raised by what rounding adds to the sensitivity, so that the local ε is that of the multiplier.

    Args:
        multiplier: σ, in units of the clip norm.
        clip_norm: the clip norm.
        step: one unit of the grid.
        values: number of values in a vector.
    """
    return multiplier * (clip_norm / step + math.sqrt(values))
