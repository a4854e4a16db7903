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

from fedlora.privacy.ledger import RosterFacts, RunTerms
from fedlora.privacy.mechanisms.distributed_gaussian import SumNoise
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.statements import Refused


class SumGuarantee(SumNoise):
    """The mechanism that a client's records meet in the sums of one roster."""

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
                   roster.values, roster.grid.sensitivity(roster.values, roster.grid.clip_norm) / sensitivity)


def facts_of(roster: Roster, terms: RunTerms, *, pinned: bool) -> RosterFacts:
    """Return what ledger and report keep of a roster that a client checked, if it keeps what the run is charged for.

    Args:
        roster: the roster.
        terms: the client's terms in the run.
        pinned: whether the owner's policy names the keys of all members.

    Raises:
        Refused: the run is charged for the noise of its sums, and the roster does not promise that much; or the clip
            norm of the terms is above the grid's.
    """
    try:
        noise = SumGuarantee.of(roster, clip_norm=terms.clip_norm, sampling_rate=terms.sampling_rate).noise_multiplier
    except ValueError as error:
        raise Refused(str(error)) from None
    facts = RosterFacts(roster.digest.hex(), len(roster.entries), roster.colluding, noise, roster.noise,
                        roster.grid.step, roster.grid.clip_norm, roster.values, pinned)
    if lacking := terms.lacks(facts):
        raise Refused(f"the run is charged for the noise of its sums, and {lacking}")
    return facts
