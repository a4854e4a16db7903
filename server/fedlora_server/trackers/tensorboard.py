"""TensorBoard's event files in the run's folder, read by `tensorboard --logdir` there or above it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fedlora_server.trackers import Watched
from fedlora_server.trackers._experiments import LAST, ExperimentTracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"


class TensorBoard(ExperimentTracker):
    """The tracker that writes event files: a curve for each number, and the settings and the report as text."""

    needs: ClassVar[Mapping[str, str]] = {"tensorboard": "fedlora[tensorboard]"}

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._writer: SummaryWriter | None = None
        self._last = 0

    @override
    def start(self, parameters: Mapping[str, str | int | float | bool]) -> Collection[int]:
        from torch.utils.tensorboard import SummaryWriter

        written = _rounds(folder := self.run.out / FOLDER)
        self._writer = SummaryWriter(str(folder))
        if not written:
            rows = "\n".join(f"| {name} | {value} |" for name, value in parameters.items())
            self._writer.add_text("parameters", f"| name | value |\n|---|---|\n{rows}", 0)
        return written

    @override
    def write(self, round: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()
        self._last = round

    @override
    def finish(self, ended: str, files: Mapping[str, bytes]) -> None:
        assert self._writer is not None
        if report := files.get("report.json"):
            self._writer.add_text("report", f"```\n{report.decode()}```", self._last)
        self._writer.close()


def _rounds(folder: Path) -> set[int]:
    """Return the rounds that the folder's event files hold in whole; none if there are no such files."""
    if not any(folder.glob("events.out.tfevents.*")):
        return set()
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {event.step for event in read.Scalars(LAST)} if LAST in read.Tags()[SCALARS] else set()


TRACKER = TensorBoard
