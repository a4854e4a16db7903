"""The roster of simulated clients: the grid and the noise that a deployed server would choose, without certificates."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from fedlora.config import SimulationConfig
from fedlora.plan import ROW, RunPlan
from fedlora.privacy import Accountant, RunTerms, Spend
from fedlora.secure_sum.guarantee import SumGuarantee
from fedlora.secure_sum.roster import Entry, Roster
from fedlora_client.terms import Limits
from fedlora_server.sum_roster import formed


def simulated_limits(options: SimulationConfig, clients: int) -> Limits:
    """Return what each simulated client allows. All clients know each other, as if each had pinned the others' keys.

    Args:
        options: the options of fedlora-simulate.
        clients: the number of clients.
    """
    return Limits.of(options, options.privacy_unit or ROW, trust=options.trust, least_members=clients)


def simulated_roster(plan: RunPlan, terms: Mapping[str, RunTerms], values: int) -> Roster | None:
    """Return the roster of all clients of a simulation; None without secure aggregation.

    Args:
        plan: the run's plan.
        terms: client name → its terms of the run.
        values: the number of values of all trained tensors.

    Raises:
        ValueError: no ring holds the clients' sum.
    """
    if not plan.secure_aggregation:
        return None
    members = {Entry(name, b"", b"", b""): (of.noise_multiplier or 0.0) * (of.clip_norm / plan.clip_norm)
               for name, of in terms.items()}
    return formed(plan, members, values)


def local_epsilon(terms: RunTerms, rounds: int) -> float:
    """Return the ε of a client's records towards someone who sees its uploads unmasked.

    Args:
        terms: the client's terms of a run with secure aggregation.
        rounds: the number of trainings that it has begun.
    """
    assert terms.noise_multiplier is not None and terms.delta is not None, "such a run is private"
    return _local(Spend(terms.noise_multiplier, terms.sampling_rate, rounds), terms.delta) if rounds else 0.0


@functools.cache  # many clients have the same terms
def _local(spend: Spend, delta: float) -> float:
    return Accountant((spend,)).epsilon(delta)


def aggregate_epsilon(roster: Roster, terms: RunTerms, rounds: int) -> float:
    """Return the ε of a client's records towards whoever sees the sums alone.

    Simulated clients count as pinned: one process runs them all.

    Args:
        roster: the roster.
        terms: the client's terms.
        rounds: the number of sums that the client is in.

    Returns:
        The ε; infinite if the noise is so small that rounding to the grid leaves no guarantee.

    Raises:
        ValueError: it is infinite, and it is the ε that the client's noise is calibrated to.
    """
    of = SumGuarantee.of(roster, clip_norm=terms.clip_norm, sampling_rate=terms.sampling_rate)
    try:
        return _epsilon(of, terms.delta or 0.0, rounds)
    except ValueError:
        if terms.aggregate_noise_multiplier is not None:
            raise
        return math.inf


@functools.cache
def _epsilon(of: SumGuarantee, delta: float, rounds: int) -> float:
    return of.epsilon(delta, rounds)
