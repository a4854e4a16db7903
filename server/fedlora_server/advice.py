"""Warnings about the training itself, each with what to try, and each said once in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from typing_extensions import override

from fedlora.figures import MAJORITY
from fedlora.plan import RunPlan

from .observer import RoundRecord
from .trackers import Tracker, Watched

RISES = 3
"""Evaluations in a row whose loss rose, and exceeds the start's, before that is said."""
EXPLODES = 10.0
"""Ratio of a round's update norm to the median of the earlier rounds' from which it is said."""
EARLIER = 3
"""Rounds with an update norm before a later one is compared with them."""
LATE = 3
"""From one part in `LATE` of the rounds on, the model should predict better than the majority rate."""


class Advice(Tracker):
    """A tracker that notices training that goes wrong, and says what to try.

    Args:
        run: the run to watch.
        say: takes each line for the coordinator.
    """

    def __init__(self, run: Watched, say: Callable[[str], None]) -> None:
        super().__init__(run)
        self._say, self._said = say, set[str]()
        self._plan: RunPlan | None = None
        self._records: list[RoundRecord] = []

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._plan, self._records = plan, list(before)

    @override
    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)
        assert self._plan is not None
        for kind, why in self._found(self._plan).items():
            if why and kind not in self._said:
                self._said.add(kind)
                self._say(f"round {record.round}: {why}")

    def _found(self, plan: RunPlan) -> Mapping[str, str]:
        late = self._records[-1].round * LATE >= plan.rounds
        evaluated = [record.evaluation for record in self._records if record.evaluation]
        now = evaluated[-1] if self._records[-1].evaluation else {}
        return {"one label": _one_label(now, plan) if late else "",
                "majority": _below_majority(evaluated, plan) if late and now else "",
                "loss": _rising(evaluated, plan) if now else "",
                "update": _exploding(self._records, plan)}


def _rate(plan: RunPlan) -> str:
    """Return the option that sets how far a round moves: with one local step of SGD it is the server's."""
    return "--server-lr" if (plan.local_steps, plan.optimizer) == (1, "sgd") else f"--lr (now {plan.lr:g})"


def _one_label(figures: Mapping[str, float], plan: RunPlan) -> str:
    recalls = {name.removeprefix("recall/"): value for name, value in figures.items()
               if name.startswith("recall/") and name.count("/") == 1}
    found = [label for label, recall in recalls.items() if recall > 0]
    if len(recalls) < 2 or len(found) != 1 or recalls[found[0]] < 1:
        return ""
    return (f"every held-out record is predicted as {found[0]}. Check that the clients' labels are not all the same; "
            f"else try a higher {_rate(plan)}, more --rounds (now {plan.rounds}) or, at the clients, a larger "
            "--epsilon")


def _below_majority(evaluated: Sequence[Mapping[str, float]], plan: RunPlan) -> str:
    trained = [figures for figures in evaluated[1:] if MAJORITY in figures]
    if not trained:
        return ""
    best, majority = max(figures["accuracy"] for figures in trained), trained[-1][MAJORITY]
    if best > majority:
        return ""
    return (f"no round's accuracy is above {majority:.3f}, what always predicting the most frequent label gives (best: "
            f"{best:.3f}). Under privacy, more records, a larger --batch-size (now {plan.expected_batch}) or a larger "
            f"--epsilon at the clients lower the noise; else try another {_rate(plan)}, and check the labels")


def _rising(evaluated: Sequence[Mapping[str, float]], plan: RunPlan) -> str:
    losses = [figures["loss"] for figures in evaluated if "loss" in figures]
    last = losses[-RISES - 1:]
    if len(last) <= RISES or not all(a < b for a, b in pairwise(last)) or last[-1] <= losses[0]:
        return ""
    fewer = f" or fewer --local-steps (now {plan.local_steps})" if plan.local_steps > 1 else ""
    return (f"the loss on the held-out records has risen {RISES} times in a row, from {last[0]:.3f} to {last[-1]:.3f}, "
            f"and is above the start's. Try a lower {_rate(plan)}{fewer}")


def _exploding(records: Sequence[RoundRecord], plan: RunPlan) -> str:
    norms = [record.update_norm for record in records if record.round and record.update_norm is not None]
    if len(norms) <= EARLIER or (usual := median(norms[:-1])) <= 0 or norms[-1] <= EXPLODES * usual:
        return ""
    return (f"the adapter moved by {norms[-1]:.3g}, more than {EXPLODES:g} times as far as usual ({usual:.3g}). If "
            f"that goes on, stop the run and begin another with a lower {_rate(plan)}")
