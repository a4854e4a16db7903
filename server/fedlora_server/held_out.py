"""What secure sums tell of the clients' held-out records (`fedlora.training.hold_out`), as figures of a round.

One round draws few of them. So the figure is that of the last `ROUNDS` rounds together, with its 95 % interval, which
covers the draws and the noise. Beside it, under names with a slash, a round's record holds what its own sum told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.plan import RunPlan
from fedlora.secure_sum.roster import Roster
from fedlora.tasks import task_named
from fedlora.training.hold_out import mean_score

from .observer import RoundRecord

ROUNDS = 10
"""Number of rounds whose sums are taken together."""

_NORMAL = 1.959964
"""95 % of a normal distribution are within so many standard deviations."""


def held_out_figures(plan: RunPlan, sums: tuple[float, float], records: Sequence[RoundRecord], roster: Roster,
                     survivors: int) -> dict[str, float]:
    """Return the figures of a round: the mean score with its interval, unless too few records were drawn to tell.

    Args:
        plan: the run's plan.
        sums: what the round's sum told: the total of 2 s − 1 over the drawn units, and their number, both in the
            gradients' scaled space, in which the noise of either is stated too.
        records: the rounds before.
        roster: the roster that opened the sum.
        survivors: number of clients in the sum.
    """
    name = f"held_out_{task_named(plan.task).scored_by}"
    noise = math.sqrt(survivors) * roster.noise * roster.grid.step
    own = {f"{name}/total": sums[0], f"{name}/drawn": sums[1], f"{name}/noise": noise}
    before = [(told[f"{name}/total"], told[f"{name}/drawn"], told[f"{name}/noise"])
              for told in (record.evaluation for record in records[1 - ROUNDS:]) if f"{name}/total" in told]
    score = mean_score([*before, (*sums, noise)], plan.clip_norm)
    if score is None:
        return own
    reach = _NORMAL * score.error
    return {name: score.mean, f"{name}/low": max(0.0, score.mean - reach), f"{name}/high": min(1.0, score.mean + reach),
            **own}
