"""How often each thing happened, in tally.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from typing_extensions import override

from fedlora.plan import RunPlan
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Tracker, Watched


class Tally(Tracker):
    """Counts events and writes them when the run ends, however it ends."""

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self.counts: Counter[str] = Counter()

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self.counts["planned"] = plan.rounds
        self.counts["rank"] = self.run.options["rank"]  # type: ignore[assignment]

    @override
    def answered(self, round: int, name: str, outcome: str) -> None:
        self.counts[outcome] += 1

    @override
    def finished(self, record: RoundRecord) -> None:
        self.counts["rounds"] += record.round > 0

    @override
    def ended(self, reason: str) -> None:
        self.counts[reason] += 1

    @override
    def close(self) -> None:
        (self.run.out / "tally.json").write_text(json.dumps(self.counts))


TRACKER = Tally
