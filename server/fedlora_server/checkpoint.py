"""What a run leaves in its folder while it lasts, so that a server can take it up again after a crash or a stop.

    run.json                 the options, the plan, who joined with what, and after which rounds it was taken up again
    asked.json               whom the last round asked, written before it does
    metrics.jsonl            one line for each finished round
    checkpoint.safetensors   the state after the last finished round, and the server step's memory as "step/<slot>/…"

The files are written in this order, and but for the lines they are always whole. A line whose round has no checkpoint
is dropped when the run is taken up again: the round asks the same clients for the same attempts once more, and those
that have trained for it send what they stored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fedlora.files import replace_file
from fedlora.plan import RunPlan, Tensors, from_scalars, to_scalars

from .folders import UNFINISHED
from .observer import RoundRecord, jsonable
from .patience import outlast

ABOUT, ASKED, LINES, STATE = "run.json", "asked.json", "metrics.jsonl", "checkpoint.safetensors"
REPORT = "report.json"
_MEMORY = "step/"
_SINCE_7 = frozenset({"usual_norm", "curbed"})
"""What lines of earlier protocols do not say of a round."""

_NOT_KEPT = frozenset({"config", "out", "resume", "labels"})
"""Options that are not those of the run, or stand in its plan."""


@dataclass(frozen=True)
class Asked:
    """Whom a round asked.

    Attributes:
        attempts: for each attempt the names of those asked.
        participations: name → how often it was asked in the run.
        declined: names of those that declined for good.
        missed: name → how many rounds in a row it did not answer in time, and from which on it is asked again.
    """

    round: int
    attempts: tuple[tuple[str, ...], ...] = ()
    participations: Mapping[str, int] = field(default_factory=dict)
    declined: tuple[str, ...] = ()
    missed: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """A run as it was left.

    Attributes:
        resumed: after which rounds it was taken up before.
        round: the last finished one; 0 if there is none.
        state: after it; None if the run was left before its first state was written.
        memory: of the server step, after it; empty where it has none.
        records: of the finished rounds.
        asked: by the last round that asked anybody.
        joined: name → what a client disclosed when it joined, before the first round.
        step: what the server does between rounds (`Recipe.described`); empty in runs of earlier versions.
    """

    plan: RunPlan
    resumed: tuple[int, ...]
    joined: Mapping[str, Mapping[str, object]]
    asked: Asked | None
    round: int
    state: Tensors | None
    memory: Tensors
    records: tuple[RoundRecord, ...]
    step: Mapping[str, object] = field(default_factory=dict)

    @property
    def resumptions(self) -> tuple[int, ...]:
        """`resumed`, once it is taken up now."""
        return *self.resumed, self.round

    @property
    def under_way(self) -> int:
        """The round that may have been begun."""
        return 0 if self.state is None and self.plan.private_start else self.round + 1

    def check(self, plan: RunPlan, step: Mapping[str, object] | None = None) -> None:
        """Raises ValueError where the plan, or what the server does, is another one by the options that are given now.
        """
        then: dict[str, object] = {**to_scalars(self.plan)}
        now: dict[str, object] = {**to_scalars(plan)}
        if self.step and step is not None:  # runs of earlier versions do not say
            then, now = {**then, **self.step}, {**now, **_plain(step)}
        changed = [f"{name} {then[name]!r}, now {now[name]!r}" for name in then if then[name] != now.get(name)]
        if changed:
            raise ValueError(f"--resume: the run was begun with {'; '.join(changed)}, and its plan cannot change while "
                             "it lasts. Leave these options out, or begin a new run in another folder")


def _put(path: Path, content: bytes) -> None:
    """Replace a file of the run's folder, which is there. Nothing in it is secret: its mode is the umask's."""
    replace_file(path, content, 0o666, make_folder=False)


def begin(folder: Path, options: Mapping[str, object], plan: RunPlan, joined: Mapping[str, Mapping[str, object]],
          resumed: tuple[int, ...] = (), step: Mapping[str, object] | None = None) -> None:
    """Write what the run is; `options` as `vars` of those of fedlora-server, `step` as of `Unfinished`."""
    kept = {name: value for name, value in options.items() if name not in _NOT_KEPT and value not in (None, {}, ())}
    about = {"options": jsonable(kept), "plan": to_scalars(plan), "joined": joined, "resumed": resumed,
             "step": _plain(step or {})}
    _put(folder / ABOUT, f"{json.dumps(about, indent=1)}\n".encode())


def remember(folder: Path, asked: Asked) -> None:
    """Write whom a round asks."""
    _put(folder / ASKED, f"{json.dumps(asdict(asked))}\n".encode())


def save(folder: Path, run_id: str, round: int, state: Tensors, memory: Tensors) -> None:
    """Replace the folder's checkpoint: a reader, or a crash, finds the old one or the new one, nothing between.

    Args:
        memory: of the server step, each array of its own dtype.
    """
    kept = {**state, **{_MEMORY + name: array for name, array in memory.items()}}
    arrays = {name: np.ascontiguousarray(array) for name, array in kept.items()}
    _put(folder / STATE, to_bytes(arrays, metadata={"run_id": run_id, "round": str(round)}))


def note(folder: Path, record: RoundRecord) -> None:
    """Add the line of a finished round, or nothing where the disk has no room for all of it."""
    with (folder / LINES).open("ab", buffering=0) as lines:  # a buffer would write again what was taken back
        whole, left = lines.seek(0, os.SEEK_END), memoryview(_line(record).encode())
        try:
            while left:
                left = left[lines.write(left):]
            os.fsync(lines.fileno())
        except OSError:
            os.ftruncate(lines.fileno(), whole)
            raise


LOOK_AGAIN_S = 2.0


def patiently(write: Callable[[], object], folder: Path, stop: threading.Event, say: Callable[[str], object]) -> None:
    """Write to the run's folder. If the disk is full, wait until it is not, so that no finished round is lost.

    Args:
        write: writes one or more files; called again from its beginning after each fault.
        folder: the run's folder.
        stop: when it is set, waiting ends.
        say: called once with the reason, if it has to wait.

    Raises:
        ValueError: the folder was removed.
        OSError: writing failed by a fault that does not pass, or the fault was still there when `stop` was set.
    """
    told = False

    def attempt() -> None:
        _check_folder(folder)
        try:
            write()
        except FileNotFoundError:
            _check_folder(folder)
            raise

    def wait(fault: OSError) -> None:
        nonlocal told
        if stop.is_set():
            raise fault
        if not told:
            say(f"{folder} cannot be written to ({fault.strerror}). It goes on when it can; Ctrl-C stops it")
        told = True
        stop.wait(LOOK_AGAIN_S)

    outlast(attempt, wait)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the run's folder {folder} was removed while the run lasted, and what it held is lost. "
                         "Nothing more is trained; start the run again, in a folder that stays")


def holds_unfinished_run(folder: Path) -> bool:
    """Whether a run was begun in the folder and is not finished, or not all of its clients may know that it is."""
    if not (folder / ABOUT).exists():
        return False
    try:
        finished = json.loads((folder / REPORT).read_text()).get("ended") == "finished"
    except (OSError, ValueError, AttributeError):
        finished = False
    return not finished or (folder / UNFINISHED).exists()


def options_of(folder: Path) -> dict[str, object]:
    """The options with which the folder's run was begun, as `fedlora.config.read_config` takes them.

    Raises:
        ValueError: the folder holds no run.
    """
    return _about(folder)["options"]


def take_up(folder: Path) -> Unfinished:
    """The folder's run as it was left; lines of rounds that were not finished are dropped from metrics.jsonl.

    Raises:
        ValueError: the folder holds no run, or one of another FedLoRA version.
    """
    about = _about(folder)
    try:
        return _take_up(folder, about)
    except (SafetensorError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"--resume: {folder} is damaged ({type(error).__name__}: {error}); restore {STATE}, {ASKED} "
                         f"and {LINES} from a copy, or begin a new run") from error


def _take_up(folder: Path, about: Mapping[str, Any]) -> Unfinished:
    try:
        plan, resumed, joined = from_scalars(about["plan"]), tuple(about["resumed"]), dict(about["joined"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {folder / ABOUT} is not of this FedLoRA version: {error}") from None
    run_id, round, state, memory = load(folder) if (folder / STATE).exists() else (plan.run_id, -1, None, {})
    if run_id != plan.run_id:
        raise ValueError(f"--resume: {folder / STATE} is of run {run_id}, and {ABOUT} of {plan.run_id}; restore the "
                         "one that belongs to the other")
    records = tuple(record for record in _records(folder / LINES) if record.round <= round)
    _put(folder / LINES, "".join(map(_line, records)).encode())
    return Unfinished(plan, resumed, joined, _asked(folder), max(0, round), state, memory, records,
                      about.get("step", {}))


def _plain(step: Mapping[str, object]) -> dict[str, Any]:
    """As it is read back."""
    return json.loads(json.dumps(jsonable(step)))


class Stored(NamedTuple):
    """A checkpoint: the state after a round, and the server step's memory, empty in those of earlier versions."""

    run_id: str
    round: int
    state: Tensors
    memory: Tensors


def load(folder: Path) -> Stored:
    """The folder's checkpoint.

    Raises:
        ValueError: there is none.
    """
    path = folder / STATE
    if not path.exists():
        raise ValueError(f"{folder} has no {STATE}; no round of that run was finished")
    with safe_open(path, framework="np") as stored:
        about = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    memory = {name.removeprefix(_MEMORY): tensors.pop(name) for name in list(tensors) if name.startswith(_MEMORY)}
    return Stored(about["run_id"], int(about["round"]), tensors, memory)


def _about(folder: Path) -> dict:
    try:
        about = json.loads((folder / ABOUT).read_text())
        if not isinstance(about, dict) or not isinstance(about.get("options"), dict):
            raise ValueError("it holds no options")
        return about
    except OSError:
        raise ValueError(f"--resume: {folder} has no {ABOUT}; name the --out folder of a run that had begun to wait "
                         "for clients. Before that nothing is lost: start it again") from None
    except ValueError as error:
        raise ValueError(f"--resume: {folder / ABOUT} cannot be read: {error}") from None


def _asked(folder: Path) -> Asked | None:
    try:
        asked = json.loads((folder / ASKED).read_text())
    except OSError:
        return None
    return Asked(asked["round"], tuple(map(tuple, asked["attempts"])), asked["participations"],
                 tuple(asked["declined"]),
                 {name: (times, until) for name, (times, until) in asked.get("missed", {}).items()})


def _records(lines: Path) -> list[RoundRecord]:
    """Those of whole lines; a crash may have cut the last one."""
    records = []
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            records.append(_record(json.loads(line)))
        except json.JSONDecodeError:
            break
    return records


def _line(record: RoundRecord) -> str:
    return json.dumps(jsonable(asdict(record)), allow_nan=False) + "\n"


def _record(values: dict) -> RoundRecord:
    """Inverse of `_line`: lists are tuples again, and what JSON does not know is a number again."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(RoundRecord)
              if field.name not in _SINCE_7 or field.name in values}
    numbers = {name: float(value) for name, value in fields["evaluation"].items()}
    for name in ("update_norm", "train_loss", "usual_norm"):
        fields[name] = None if fields.get(name) is None else float(fields[name])
    return RoundRecord(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
                       | {"evaluation": numbers})
