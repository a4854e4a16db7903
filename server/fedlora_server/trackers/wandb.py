"""A run of Weights & Biases, kept in the run's folder until `wandb sync`, or sent at once if WANDB_MODE is online."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from typing_extensions import override

from fedlora.files import replace_file
from fedlora_server.trackers import Watched
from fedlora_server.trackers._experiments import PROJECT, ExperimentTracker

if TYPE_CHECKING:
    from wandb import Run

STATE = "wandb-run.json"
"""The run's id at W&B and the rounds written, by which a resumed run goes on."""


class WandB(ExperimentTracker):
    """The tracker that writes a run of W&B.

    W&B can note much about a machine. All of it is off: console, command line, code, git, host and hardware.
    """

    needs: ClassVar[Mapping[str, str]] = {"wandb": "fedlora[wandb]"}

    def __init__(self, run: Watched) -> None:
        super().__init__(run)
        self._log: Run | None = None
        self._id, self._written = "", list[int]()

    @override
    def start(self, parameters: Mapping[str, str | int | float | bool]) -> Collection[int]:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._id, self._written = self._known()
        mode: Literal["offline"] | None = None if os.environ.get("WANDB_MODE") else "offline"
        self._log = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), dir=str(self.run.out), id=self._id, resume="allow",
            name=self.run.title, config=dict(parameters), mode=mode, reinit="create_new",
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True, host="", program="",
                                    save_code=False, silent=True, x_disable_machine_info=True, x_disable_meta=True,
                                    x_disable_stats=True, x_save_requirements=False))
        return tuple(self._written)

    def _known(self) -> tuple[str, list[int]]:
        """Return the id and the written rounds of the run that an earlier server began, or of a new one."""
        try:
            known = json.loads((self.run.out / STATE).read_text())
            return known["run_id"], known["rounds"]
        except FileNotFoundError:
            return self.run.run_id or secrets.token_hex(8), []

    @override
    def write(self, round: int, values: Mapping[str, float]) -> None:
        assert self._log is not None
        self._log.log(dict(values), step=round)
        self._written.append(round)
        replace_file(self.run.out / STATE, json.dumps({"run_id": self._id, "rounds": self._written}).encode(), 0o666)

    @override
    def finish(self, ended: str, files: Mapping[str, bytes]) -> None:
        assert self._log is not None
        folder = Path(self._log.dir)
        for name, content in files.items():
            (folder / name).write_bytes(content)
            self._log.save(str(folder / name), base_path=str(folder), policy="end")
        self._log.finish(exit_code=0 if ended in ("finished", "stopped") else 1)


TRACKER = WandB
