"""rounds.csv, a line for each finished round, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from fedlora.files import replace_file
from fedlora.plan import RunPlan
from fedlora_server.observer import RoundRecord
from fedlora_server.trackers import Tracker, Watched

FILE = "rounds.csv"
OF_A_ROUND = ("round", "asked", "uploaded", "lost", "refused", "rejected", "update_norm", "train_loss", "bytes_up",
              "bytes_down", "seconds")
"""Its first columns; the figures of evaluations come after them. Of clients, it has how many there were."""


class Table(Tracker):
    """Writes the file whole after each round: which figures there will be is not known before they are."""

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._records: list[RoundRecord] = []

    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        self._records = list(before)
        self._write()

    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)
        self._write()

    def _write(self) -> None:
        figures = dict.fromkeys(name for record in self._records for name in record.evaluation)
        text = io.StringIO()
        table = csv.DictWriter(text, [*OF_A_ROUND, *figures], restval="")
        table.writeheader()
        table.writerows(map(_line, self._records))
        replace_file(self.run.out / FILE, text.getvalue().encode(), 0o666)


def _line(record: RoundRecord) -> Mapping[str, object]:
    counted = {"asked": record.cohort, "uploaded": record.uploaded, "lost": record.lost, "refused": record.refused,
               "rejected": record.rejected}
    values = {name: getattr(record, name) for name in OF_A_ROUND if name not in counted}
    return {name: len(names) for name, names in counted.items()} | values | dict(record.evaluation)


TRACKER = Table
