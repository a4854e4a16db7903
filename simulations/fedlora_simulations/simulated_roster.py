"""The roster of simulated clients: the grid and the noise that a deployed server would choose, without certificates."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from fedlora.plan import RunPlan
from fedlora.privacy import RunTerms
from fedlora.secure_sum.guarantee import SumGuarantee
from fedlora.secure_sum.roster import Entry, Roster
from fedlora_server.sum_roster import formed


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


def aggregate_epsilon(roster: Roster, terms: RunTerms, rounds: int) -> float:
    """Return the ε of a client's records towards whoever sees the sums alone.

    Simulated clients count as pinned: one process runs them all.

    Args:
        roster: the roster.
        terms: the client's terms.
        rounds: the number of sums that the client is in.

    Raises:
        ValueError: the grid is too coarse for the client's δ.
    """
    of = SumGuarantee.of(roster, clip_norm=terms.clip_norm, sampling_rate=terms.sampling_rate)
    return _epsilon(of, terms.delta or 0.0, rounds)


@functools.cache  # many clients have the same terms
def _epsilon(of: SumGuarantee, delta: float, rounds: int) -> float:
    return of.epsilon(delta, rounds)
