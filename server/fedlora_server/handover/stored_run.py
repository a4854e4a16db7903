"""A run as its folder holds it: read without changing anything, also while a server works in it or after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedlora import models
from fedlora.adapters import AdaptedModel, attach_planned
from fedlora.places import expanded
from fedlora.plan import Refused, RunPlan, Tensors, from_scalars
from fedlora_server import checkpoint
from fedlora_server.observer import RoundRecord

MOST_SHOWN = 6
"""Most runs that a message names."""


@dataclass(frozen=True)
class StoredRun:
    """A run with at least one finished round.

    Attributes:
        folder: the run's folder.
        plan: the run's plan.
        options: the options with which it was begun, as JSON.
        step: the parts of the server step; empty if they are not known.
        round: the last finished round.
        state: every tensor that is not in the base checkpoint, after that round.
        memory: the server step's memory after that round.
        records: one record for each finished round.
        simulated: whether it is a simulation.
    """

    folder: Path
    plan: RunPlan
    options: Mapping[str, Any]
    step: Mapping[str, Any]
    round: int
    state: Tensors
    memory: Tensors
    records: tuple[RoundRecord, ...]
    simulated: bool

    def adapted(self, model: str | None = None, *, allow_download: bool = False) -> AdaptedModel:
        """Load the base model and put the run's adapter on it.

        Args:
            model: the base model, as --model names it; None for the one that the run used.
            allow_download: fetch a hub model that is not in the hub's cache on this machine.

        Raises:
            ValueError: the base model is not there, is not the run's, or does not fit the checkpoint.
        """
        path = self._base(model, allow_download)
        adapted = attach_planned(models.load(path, self.plan.task, self.plan.labels), self.plan)
        adapted.layout.check(self.state, "state")
        adapted.write(self.state)
        return adapted

    def _base(self, model: str | None, allow_download: bool) -> Path:
        """Return the folder of the run's base model, checked by its hashes."""
        named = self.plan.model.name
        name = model or (str(self.options.get("model", "")) if named == "local" else named)
        if not name:
            raise ValueError(f"{self.folder} does not say where the base model {self.plan.model.title} is; name the "
                             "folder with --model PATH")
        try:
            path = models.resolve(str(expanded(name)) if name.startswith("~") else name, allow_download=allow_download)
        except ValueError as error:
            more = "" if model else f" The run used {self.plan.model.title}; name a copy of it with --model PATH."
            raise ValueError(f"{error}{more}") from None
        try:
            models.verify(self.plan.model, path)
        except Refused as refused:
            raise ValueError(f"{path} is not the base model of this run, {self.plan.model.title}: "
                             f"{refused.refusal.detail}. Name the right one with --model PATH") from None
        return path


def stored_run(folder: Path) -> StoredRun:
    """Read a run's folder.

    Args:
        folder: the --out folder of a server, or the folder of one run of a simulation.

    Raises:
        ValueError: the folder holds no run, several runs, a run without a finished round, a run of an incompatible
            FedLoRA version, or damaged files.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the --out folder of a run")
    begun, report = (_json(folder / name) for name in (checkpoint.ABOUT, checkpoint.REPORT))
    about = begun or report
    if about is None:
        raise ValueError(_no_run(folder))
    try:
        plan = from_scalars(about["plan"])
        options = {str(name): value for name, value in about["options"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the run in {folder} was not written by this FedLoRA version, {_why(error)}. Use the version "
                         "that wrote it") from None
    try:
        stored = checkpoint.load(folder)
        records = checkpoint.finished_records(folder, stored.round)
    except (SafetensorError, OSError, LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged, {_why(error)}; restore {checkpoint.STATE} and {checkpoint.LINES} from "
                         "a copy") from None
    if stored.run_id != plan.run_id:
        raise ValueError(f"{folder / checkpoint.STATE} belongs to run {stored.run_id}, and the folder to run "
                         f"{plan.run_id}; restore the file that belongs to the other")
    if not stored.round:
        raise ValueError(f"no round of the run in {folder} was finished yet, so there is no adapter")
    step = (begun or {}).get("step") or (report or {}).get("strategy") or {}
    return StoredRun(folder, plan, options, step, stored.round, stored.state, stored.memory, records,
                     simulated="partition" in options)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None if there is no such file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: it holds no object")
    return found


def _no_run(folder: Path) -> str:
    """Return why a folder holds no run, for a message."""
    runs = sorted(one.name for one in folder.iterdir() if (one / checkpoint.STATE).is_file())
    if runs:
        more = f" and {len(runs) - MOST_SHOWN} more" if len(runs) > MOST_SHOWN else ""
        return f"{folder} holds several runs; name one of them: {', '.join(runs[:MOST_SHOWN])}{more}"
    if (folder / checkpoint.STATE).is_file():
        return (f"{folder} has neither {checkpoint.ABOUT} nor {checkpoint.REPORT}, as where a simulation by an earlier "
                "version was stopped: nothing says what its checkpoint belongs to. Start the simulation again")
    return f"{folder} has neither {checkpoint.ABOUT} nor {checkpoint.REPORT}; name the --out folder of a run"
