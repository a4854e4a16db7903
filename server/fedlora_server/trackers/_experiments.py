"""What experiment trackers are told of a run: settings, numbers of each round, and two files at the end.

They may keep it outside of this machine, so they are told no client's name and nothing that a client disclosed, and of
this machine neither paths nor addresses.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from fedlora.plan import RunPlan, to_scalars
from fedlora_server.checkpoint import REPORT
from fedlora_server.observer import RoundRecord, jsonable
from fedlora_server.trackers import Tracker, Watched

PROJECT = "fedlora"
"""Name of the project or experiment that runs belong to, unless the environment names another."""

OPTIONS = ("batch_clients", "clients", "clients_per_round", "compile", "declared_size", "delta", "device", "engine",
           "epsilon", "eval_every", "init", "init_head", "max_clip_norm", "micro_batch", "min_clients", "min_replies",
           "one_step", "partition", "precision", "privacy_unit", "reduction", "reduction_options", "round_timeout",
           "rows_per_unit", "scaling", "screen", "seed", "server_lr", "server_optimizer", "server_options",
           "strategy_options", "threads", "trust", "wait_timeout", "workers")
"""Options that are told beside the plan. The others name files or addresses, or are in the plan."""

OF_A_REPORT = ("ended", "finished_rounds", "resumed_after_rounds", "evaluation", "plan", "strategy", "versions",
               "values_per_client", "bytes", "seconds")
"""Keys of report.json that are told as they stand."""

LAST = "training/seconds"
"""The last number of a round that is written. A store that has it has all of that round."""

CURVES = "curves.png"


def parameters(run: Watched, plan: RunPlan) -> dict[str, str | int | float | bool]:
    """Return the plan and the options of a run that have a value, by name; lists as text.

    Args:
        run: the run.
        plan: its plan.
    """
    options = {name: run.options.get(name) for name in OPTIONS}
    for name in ("init", "init_head"):
        if isinstance(start := options.get(name), str):
            options[name] = start.partition(":")[0]  # a file's name may follow
    return {name: _plain(value) for name, value in (options | to_scalars(plan)).items()
            if value not in (None, "", (), [], {})}


def _plain(value: object) -> str | int | float | bool:
    if isinstance(value, list | tuple):
        return ",".join("=".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in value)
    return value if isinstance(value, str | int | float | bool) else str(value)


def numbers(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a round by name, the one named `LAST` at the end."""
    counted = {"asked": record.cohort, "uploaded": record.uploaded, "lost": record.lost, "refused": record.refused,
               "rejected": record.rejected}
    trained = {"update_norm": record.update_norm, "loss": record.train_loss}
    return {**{f"evaluation/{name}": float(value) for name, value in record.evaluation.items()},
            **{f"clients/{name}": float(len(names)) for name, names in counted.items()},
            **{f"traffic/{name}": float(getattr(record, name)) for name in ("bytes_up", "bytes_down")},
            **{f"training/{name}": value for name, value in trained.items() if value is not None},
            LAST: record.seconds}


class ExperimentTracker(Tracker):
    """A tracker that hands a run to an experiment store, round by round.

    A resumed run goes on in the same place of the store: rounds that it lacks are added, and none is written twice.
    """

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._parameters: dict[str, str | int | float | bool] | None = None
        self._records: list[RoundRecord] = []
        self._ended = "failed"

    @abstractmethod
    def start(self, parameters: Mapping[str, str | int | float | bool]) -> Collection[int]:
        """Begin to write, and return the rounds that an earlier server of the run has written.

        Args:
            parameters: what `parameters` returns.
        """

    @abstractmethod
    def write(self, round: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a round, which `numbers` returns."""

    @abstractmethod
    def finish(self, ended: str, files: Mapping[str, bytes]) -> None:
        """Write the closing files and end.

        Args:
            ended: as `Tracker.ended` tells it; "failed" if the rounds did not come to an end.
            files: name → content of report.json, without what is about single clients, and of curves.png; those that
                there are.
        """

    @override
    def begin(self, plan: RunPlan, before: Sequence[RoundRecord]) -> None:
        parameters_ = parameters(self.run, plan)
        written = self.start(parameters_)
        self._parameters, self._records = parameters_, list(before)
        for record in before:
            if record.round not in written:
                self.write(record.round, numbers(record))

    @override
    def finished(self, record: RoundRecord) -> None:
        self._records.append(record)
        self.write(record.round, numbers(record))

    @override
    def ended(self, reason: str) -> None:
        self._ended = reason

    @override
    def close(self) -> None:
        if self._parameters is not None:
            self.finish(self._ended, self._files(self._parameters))

    def _files(self, parameters: Mapping[str, object]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        if (report := self.run.out / REPORT).exists():
            found[REPORT] = told_report(report, parameters, self._records)
        if (curves := self.run.out / CURVES).exists():
            found[CURVES] = curves.read_bytes()
        return found


def told_report(path: Path, parameters: Mapping[str, object], records: Sequence[RoundRecord]) -> bytes:
    """Return a report.json that says nothing about single clients and this machine's files.

    Args:
        path: the run's report.json.
        parameters: what `parameters` returns.
        records: the records of all rounds.
    """
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    told = {name: report[name] for name in OF_A_REPORT if name in report}
    told |= {"parameters": parameters, "rounds": [{"round": one.round} | numbers(one) for one in records]}
    return f"{json.dumps(jsonable(told), indent=1, allow_nan=False)}\n".encode()
