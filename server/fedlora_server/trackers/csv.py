"""The file rounds.csv: one line for each finished round, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from typing_extensions import override

from fedlora.files import replace_file
from fedlora.plan import RunPlan
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Tracker, Watched

FILE = "rounds.csv"
OF_A_ROUND = ("round", "asked", "uploaded", "lost", "refused", "rejected", "update_norm", "train_loss", "bytes_up",
              "bytes_down", "seconds")
"""The first columns; the seconds of a secure sum's phases and the figures of evaluations follow.

Columns about clients hold numbers of clients, not names."""


class Table(Tracker):
    """The tracker that writes rounds.csv.

    It writes the whole file after each round, because later rounds may bring figures that earlier ones lack.
    """

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._records: list[RoundRecord] = []

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._records = list(before)
        self._write()

    @override
    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)
        self._write()

    def _write(self) -> None:
        lines = [_line(record) for record in self._records]
        columns = dict.fromkeys((*OF_A_ROUND, *(name for line in lines for name in line)))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, restval="")
        table.writeheader()
        table.writerows(lines)
        replace_file(self.run.out / FILE, text.getvalue().encode(), 0o666)


def _line(record: RoundRecord) -> Mapping[str, object]:
    counted = {"asked": record.cohort, "uploaded": record.uploaded, "lost": record.lost, "refused": record.refused,
               "rejected": record.rejected}
    values = {name: getattr(record, name) for name in OF_A_ROUND if name not in counted}
    phases = {f"seconds_{phase}": seconds for phase, seconds in record.phases.items()}
    return {name: len(names) for name, names in counted.items()} | values | phases | dict(record.evaluation)


TRACKER = Table
