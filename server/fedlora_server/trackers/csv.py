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
"""The first columns; the figures of evaluations follow. Columns about clients hold numbers of clients, not names."""


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
