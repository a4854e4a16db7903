"""An account of a run so far, of bounded size: what its page shows beside the records of its rounds."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlora.plan import RunPlan
from fedlora_server.observer import RoundRecord

REPLIED, LEFT_OUT, DECLINED, LOST, NOT_ASKED = MARKS = "●◐–×·"
"""A client's marks in the rounds: its upload was taken, or left out; it declined, or was lost; it was not asked."""
SHOWN_MARKS = 40
"""Number of a client's last rounds that have a mark."""
MOST_MEMBERS = 2000
"""Largest number of clients that are followed. A peer can make up names, if names are not proved."""
MOST_NOTES = 40
"""Number of the last lines for the coordinator that are kept."""
MOST_SPANS = 6
"""Number of a client's last spans of rounds, with one disclosure each, that are kept."""


@dataclass(frozen=True)
class Span:
    """Rounds in a row in which a client disclosed the same.

    Attributes:
        first: number of the first round.
        last: number of the last one.
        said: the numbers that came with the upload's tensors.
    """

    first: int
    last: int
    said: Mapping[str, int | float]


@dataclass
class Member:
    """A client's part in the rounds so far.

    Attributes:
        asked: number of rounds in which it was asked.
        uploaded: number of its uploads that came in time.
        left_out: number of its uploads that a round left out.
        lost: number of rounds in which it was lost.
        refused: code → number of rounds in which it declined with it.
        last: number of the last round that has its upload; None without one.
        marks: its last marks, oldest first.
        spans: what it disclosed, the last `MOST_SPANS` spans.
        earlier: number of rounds with earlier disclosures.
    """

    asked: int = 0
    uploaded: int = 0
    left_out: int = 0
    lost: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    last: int | None = None
    marks: deque[str] = field(default_factory=lambda: deque(maxlen=SHOWN_MARKS))
    spans: deque[Span] = field(default_factory=deque)
    earlier: int = 0


class Account:
    """What happened in a run. Its user keeps threads apart.

    Attributes:
        plan: the run's plan; None before the rounds have begun.
        records: the records of the finished rounds, of earlier servers too.
        members: name → the client's part.
        unfollowed: number of orders to further clients, beyond `MOST_MEMBERS`.
        notes: (Unix time, line) for the coordinator, the last ones.
        resumed_after: number of the round after which this server took up the run; None if it began the run.
        ended: how the rounds ended; "" while they last.
        closed: whether nothing more will come.
    """

    def __init__(self) -> None:
        self.plan: RunPlan | None = None
        self.records: list[RoundRecord] = []
        self.members: dict[str, Member] = {}
        self.unfollowed = 0
        self.notes: deque[tuple[float, str]] = deque(maxlen=MOST_NOTES)
        self.resumed_after: int | None = None
        self.ended, self.closed = "", False

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        """Take the plan, and the records of an earlier server."""
        self.plan = plan
        for record in before:
            self.finished(record)
        self.resumed_after = before[-1].round if before else None

    def note(self, line: str) -> None:
        """Keep a line for the coordinator."""
        self.notes.append((time.time(), line))

    def finished(self, record: RoundRecord) -> None:
        """Take the record of a finished round."""
        self.records.append(record)
        if not record.cohort:
            return
        uploaded, lost = set(record.uploaded), set(record.lost)
        for name in record.cohort:
            if name not in self.members and len(self.members) >= MOST_MEMBERS:
                self.unfollowed += 1
                continue
            member = self.members.setdefault(name, Member())
            member.asked += 1
            if name in uploaded:
                member.uploaded, member.last = member.uploaded + 1, record.round
                member.left_out += name in record.rejected
            elif name in record.refused:
                member.refused[record.refused[name]] += 1
            else:
                member.lost += name in lost
            member.marks.append(LEFT_OUT if name in record.rejected else REPLIED if name in uploaded
                                else DECLINED if name in record.refused else LOST)
        asked = set(record.cohort)
        for name, member in self.members.items():
            if name not in asked:
                member.marks.append(NOT_ASKED)
        for name, said in record.disclosed.items():
            if name in self.members:
                self._disclosed(self.members[name], record.round, said)

    @staticmethod
    def _disclosed(member: Member, round: int, said: Mapping[str, int | float]) -> None:
        if member.spans and member.spans[-1].last == round - 1 and member.spans[-1].said == said:
            member.spans[-1] = replace(member.spans[-1], last=round)
            return
        member.spans.append(Span(round, round, said))
        if len(member.spans) > MOST_SPANS:
            first = member.spans.popleft()
            member.earlier += first.last - first.first + 1

    def copy(self) -> Account:
        """Return an account that later events do not change."""
        other = Account()
        other.plan, other.resumed_after, other.ended, other.closed, other.unfollowed = (
            self.plan, self.resumed_after, self.ended, self.closed, self.unfollowed)
        other.records, other.notes = list(self.records), deque(self.notes)
        other.members = {name: replace(member, refused=Counter(member.refused), marks=deque(member.marks),
                                       spans=deque(member.spans)) for name, member in self.members.items()}
        return other
