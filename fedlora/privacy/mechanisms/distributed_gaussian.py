"""Distributed Gaussian noise: the server sees sums alone, and each client adds a share of a sum's noise.

A client's records meet two mechanisms. Someone who sees the client's upload unmasked is held off by the client's own
noise alone, as in `dp_sgd`; its ε is called local. Whoever sees the sums alone is held off by the noise of at least
h = T − t honest members, where T is the threshold of the roster and t the number of members who may collude with the
server; its ε is called aggregate. The owner's policy says which of the two is charged.

The aggregate one is that of a subsampled Gaussian mechanism for each of the sums. The members' noise is rounded to a
grid, which `fedlora.privacy.rounding` bounds; a hundredth of δ is set aside for that.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedlora.plan import RunPlan
from fedlora.plan.limits import sum_threshold
from fedlora.privacy.accounting import SIGMA_STEP, Accountant, Budget, calibrate
from fedlora.privacy.mechanisms import Mechanism, Noise
from fedlora.privacy.rounding import rounding_delta

ROUNDING_SHARE = 0.01
"""Share of δ that is set aside for what rounding to the grid changes."""

MOST_INFLATION = 0.01
"""Largest share by which rounding to the grid may raise the sensitivity of a sum."""

_INTERVAL = 3e-3  # of dp-accounting's grid of privacy losses; its estimate is from above, and a finer one is lower


class DistributedGaussian(Mechanism):
    """The Poisson-sampled Gaussian mechanism with shares of its noise by the members of a roster."""

    promise: ClassVar[str] = (
        "Each member adds a share of this noise, and the server sees sums alone, each with the shares of at least as "
        "many honest members as are stated here. The figure holds against whoever sees these sums, the server "
        "included, if all members are who their pinned keys say, no more of them than stated use what they know, alone "
        "or with the server, and the others keep to the protocol.")
    stores: ClassVar[tuple[str, ...]] = ("mechanism", "aggregate_noise_multiplier", "least_members", "colluding")

    @override
    def calibrate(self, budget: Budget, run: RunPlan, clip_norm: float, relied: int | None = None) -> Noise:
        least = run.least_noise * run.clip_norm / clip_norm
        steps = run.most_trainings * run.local_steps
        if relied is None:
            return Noise(max(budget.noise_multiplier(run.expected_batch, steps), least))
        aggregate = calibrate(budget.epsilon, (1 - ROUNDING_SHARE) * budget.delta,
                              budget.sampling_rate(run.expected_batch), steps)
        # A roster's noise is that of the least member at the plan's clip norm. A lower clip norm of one's own has the
        # same grid, so that rounding weighs more in it.
        share = clip_norm / run.clip_norm
        rounding = (share + MOST_INFLATION) / (share * (1 + MOST_INFLATION))
        own = _above(rounding * aggregate / math.sqrt(honest(relied, run.colluding)))
        return Noise(max(own, least), aggregate)

    @override
    def raised(self, noise: Noise, charged: float) -> Noise:
        if noise.aggregate is None:
            return Noise(charged)
        return Noise(_above(noise.own * charged / noise.aggregate), charged)

    @override
    def steps_delta(self, noise: Noise, delta: float) -> float:
        return delta if noise.aggregate is None else (1 - ROUNDING_SHARE) * delta


def sum_sensitivity(clip_norm: float, step: float, values: int) -> float:
    """Return how far one unit can move an encoded sum, in units of the grid (L2).

    Two sums that differ by C differ by at most C + √d·step when each coordinate of both is rounded.

    Args:
        clip_norm: the client's own clip norm.
        step: one unit of the grid, as a real value.
        values: d, the number of values in the vector.
    """
    return clip_norm / step + math.sqrt(values)


def honest(members: int, colluding: int) -> int:
    """Return h = T − t, the fewest shares of noise by honest members in a sum that a roster can open."""
    return sum_threshold(members) - colluding


def foretold_epsilon(own: float, sampling_rate: float, rounds: int, delta: float, *, members: int,
                     colluding: int) -> float:
    """Return the ε at δ towards whoever sees the sums alone, before a roster is known, if all members are alike.

    Args:
        own: the noise multiplier of each member.
        sampling_rate: the probability with which each unit enters a step.
        rounds: number of sums.
        delta: δ. A hundredth of it is set aside for the rounding.
        members: n, the number of members.
        colluding: t, how many of them may tell the server what they know.
    """
    accountant = Accountant()
    accountant.add(math.sqrt(honest(members, colluding)) * own, sampling_rate, rounds)
    return accountant.epsilon((1 - ROUNDING_SHARE) * delta)


def _above(multiplier: float) -> float:
    """Return the next multiple of `SIGMA_STEP` above, so that no rounding of floats leaves a sum with too little."""
    return SIGMA_STEP * (math.floor(multiplier / SIGMA_STEP) + 1)


@dataclass(frozen=True)
class SumNoise:
    """The mechanism that one client's records meet in the sums of a run.

    Attributes:
        noise_multiplier: the sum's noise by honest members, over the client's sensitivity.
        sampling_rate: q_i, the probability with which each unit enters a step.
        deviation: standard deviation of one member's noise before rounding, in units of the grid.
        honest: h.
        values: d, the number of values in a vector.
        others: the largest sensitivity of a member over this client's: how far a unit moves the sum at a client that
            clips to the plan's clip norm. 1 for a client that does so itself.
    """

    noise_multiplier: float
    sampling_rate: float
    deviation: float
    honest: int
    values: int
    others: float

    def epsilon(self, delta: float, rounds: int, *, clients: int = 1) -> float:
        """Return an upper bound on ε at δ of a run's sums, for one unit under the zero-out relation.

        If one person's records are at several clients, a step moves the sum once for each of them that it samples. The
        shift of the Gaussian is then one length or none by this client, and `others` lengths for each other client that
        samples one, which dp-accounting's mixture of Gaussians bounds.

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
        epsilon = self._of_one(own, rounds) if clients == 1 else _of_several(
            self.noise_multiplier, self.sampling_rate, self.others, own, rounds, clients)
        self.check_rounding(delta, rounds, epsilon)
        return epsilon

    def check_rounding(self, delta: float, rounds: int, epsilon: float) -> float:
        """Return what rounding adds to δ at ε over a number of sums.

        Raises:
            ValueError: it is more than the share of δ that is set aside for it.
        """
        added = rounding_delta(self.deviation, self.honest, coordinates=self.values * rounds, epsilon=epsilon)
        if not added <= ROUNDING_SHARE * delta:
            raise ValueError(f"rounding to the grid would add {added:.2g} to δ = {delta:g} at ε = {epsilon:.4g}, and a "
                             "hundredth of δ is set aside for it; give a lower --epsilon, or have own noise charged "
                             '(trust "local")')
        return added

    def _of_one(self, delta: float, rounds: int) -> float:
        accountant = Accountant()
        accountant.add(self.noise_multiplier, self.sampling_rate, rounds)
        return accountant.epsilon(delta)


@functools.lru_cache(maxsize=64)  # a client asks for the same figure after each round
def _of_several(noise_multiplier: float, q: float, others: float, delta: float, rounds: int, clients: int) -> float:
    from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

    drawn = [(k * others, math.comb(clients - 1, k) * q**k * (1 - q)**(clients - 1 - k)) for k in range(clients)]
    shifts = [shift + own for shift, _ in drawn for own in (0, 1)]
    probabilities = [probability * own for _, probability in drawn for own in (1 - q, q)]
    step = from_mixture_gaussian_mechanism(noise_multiplier, shifts, probabilities,
                                           value_discretization_interval=_INTERVAL)
    return float(step.self_compose(rounds).get_epsilon_for_delta(delta))


MECHANISM = DistributedGaussian
