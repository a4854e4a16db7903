"""The judgement of a case: what went wrong, and how much time it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from tests.chaos.cases import Case
from tests.chaos.federation import ROUNDS
from tests.chaos.observed import CLIENTS, EVERYONE, Observed

MORE_THREADS, MORE_DESCRIPTORS = 32, 32
"""Most threads and descriptors of a process beyond those of the quiet run: streams that are being ended hold some."""

MAY_BE_LEFT = ("*/home/state/fedlora/ledger.sqlite-runs/*", "*/state/*/said.json")
"""Files that any case may leave: the lock of a run whose client was started again and not asked again, which the next
run removes, and the refusals of a run, for its privacy report."""


@dataclass(frozen=True)
class Score:
    """What a case came to.

    Attributes:
        case: the case.
        wrong: what is not as it must be; empty if it passed.
        seconds: how long it lasted.
        lost_s: how much longer than the quiet runs of its setting, by their median.
        again: trainings that were charged and whose update is not in the run.
        left_behind: files that the quiet run does not leave.
        restarts: how often a supervisor started a process again.
        hands: how often a person did.
        skipped: why it was not run; "" if it was.
    """

    case: Case
    wrong: tuple[str, ...] = ()
    seconds: float = 0.0
    lost_s: float = 0.0
    again: int = 0
    left_behind: tuple[str, ...] = ()
    restarts: int = 0
    hands: int = 0
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.wrong and not self.skipped


def score(case: Case, seen: Observed, quiet: Observed, same: Observed) -> Score:
    """Judge a run.

    Args:
        case: what happened to it.
        seen: what came of it.
        quiet: what came of the run of the same setting to which nothing happened.
        same: what came of the first run in which the same clients uploaded in each round.
    """
    again = sum(seen.charges.values()) - sum(map(len, seen.rounds.values()))
    left = tuple(sorted(file for file in seen.files - quiet.files))
    wrong = [*seen.missed, *_ended(case, seen), *_result(case, seen, same), *_ledgers(seen)]
    if again > len(case.without):
        wrong.append(f"{again} trainings charged whose update is not in the run, at most {len(case.without)} expected")
    may_be_left = (*MAY_BE_LEFT, *case.leaves)
    if unexpected := [file for file in left if not any(fnmatch(file, pattern) for pattern in may_be_left)]:
        wrong.append(f"left behind: {', '.join(unexpected)}")
    if seen.tracebacks:
        wrong.append(f"a traceback in the log of {', '.join(seen.tracebacks)}")
    for who, (threads, descriptors) in seen.most.items():
        before = quiet.most.get(who, (threads, descriptors))
        if threads > before[0] + MORE_THREADS or descriptors > before[1] + MORE_DESCRIPTORS:
            wrong.append(f"{who} had {threads} threads and {descriptors} descriptors, undisturbed {before[0]} and "
                         f"{before[1]}")
    return Score(case, tuple(wrong), seen.seconds, 0.0, again, left,
                 sum(map(len, seen.codes.values())) - len(EVERYONE) + len(seen.untold) - sum(seen.hands.values()),
                 sum(seen.hands.values()))


def _ended(case: Case, seen: Observed) -> list[str]:
    wrong = [] if seen.in_time else [f"not at its end within {seen.seconds:.0f} s"]
    ends: Mapping[str, object] = {who: codes[-1] for who, codes in seen.codes.items() if codes}
    if ends.get("server") != 0:
        wrong.append(f"the server ended with {ends.get('server')}")
    may_miss_the_end = case.untold | (case.without & case.by_hand)
    wrong += [f"{who} ended with {ends.get(who)}" for who in seen.untold if who not in may_miss_the_end]
    unexpected, needless = seen.hands.keys() - case.by_hand, case.by_hand - seen.hands.keys()
    wrong += [f"{who} ended with {ends[who]}, which a person has to see to" for who in sorted(unexpected)]
    wrong += [f"{who} needed no person, against what is expected" for who in sorted(needless)]
    return wrong


def _result(case: Case, seen: Observed, same: Observed) -> list[str]:
    if not seen.adapter:
        return ["there is no adapter"]
    wrong = [] if list(seen.rounds) == list(range(1, ROUNDS + 1)) else [f"the rounds are {list(seen.rounds)}"]
    lacking = {who for uploaded in seen.rounds.values() for who in CLIENTS if who not in uploaded}
    wrong += [f"a round closed without {who}" for who in sorted(lacking - case.without)]
    if seen.adapter != same.adapter:
        wrong.append("the adapter is another than that of a run with the same updates")
    return wrong


def _ledgers(seen: Observed) -> list[str]:
    """Return which ledgers know of less than was done. Over, which a kill can cause, is `Score.again`."""
    wrong = [f"{who} began {begun} trainings, and its ledger charges {seen.charges.get(who, 0)}"
             for who, begun in seen.trainings.items() if begun > seen.charges.get(who, 0)]
    if unknown := seen.left - seen.released:
        wrong.append(f"{len(unknown)} updates left that no ledger records")
    if len(seen.left) > sum(seen.charges.values()):
        wrong.append(f"{len(seen.left)} updates left, and {sum(seen.charges.values())} are charged")
    if seen.adapter and not seen.left:
        wrong.append("the server was not seen to receive an update")
    return wrong
