"""Tally: count how often each event happened, in tally.json; a toy, which no package knows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from fedlora.plan import RunPlan
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Tracker, Watched


class Tally(Tracker):
    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self.counts: Counter[str] = Counter()

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self.counts["planned"] = plan.rounds
        self.counts["rank"] = self.run.options["rank"]  # type: ignore[assignment]

    def answered(self, round: int, name: str, outcome: str) -> None:
        self.counts[outcome] += 1

    def finished(self, record: RoundRecord) -> None:
        self.counts["rounds"] += record.round > 0

    def ended(self, reason: str) -> None:
        self.counts[reason] += 1

    def close(self) -> None:
        (self.run.out / "tally.json").write_text(json.dumps(self.counts))


TRACKER = Tally
