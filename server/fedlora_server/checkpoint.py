"""The files in a run's folder from which a server resumes the run after a crash or a stop.

    run.json                 the options, the plan, what each client disclosed, and after which rounds it was resumed
    asked.json               which clients the latest round asks, written before it asks them
    metrics.jsonl            one line for each finished round
    checkpoint.safetensors   the state after the last finished round, and the server step's memory as "step/<slot>/…"
    names/                   who owns each client name (`names`)

A round writes asked.json, metrics.jsonl and checkpoint.safetensors in this order. Each is replaced atomically, except
metrics.jsonl, which grows by a line. If the server dies between the last two writes, metrics.jsonl has a line for a
round without a checkpoint. It is dropped when the run is resumed: the round asks the same clients for the same attempts
again, and those that have trained for them send the upload that they stored.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fedlora.config.shared import USUAL_TRACKERS
from fedlora.files import append_to_file, replace_file
from fedlora.plan import RunPlan, Tensors, from_scalars, to_scalars

from .folders import UNFINISHED
from .observer import RoundRecord, jsonable
from .patience import outlast

ABOUT, ASKED, LINES, STATE = "run.json", "asked.json", "metrics.jsonl", "checkpoint.safetensors"
REPORT = "report.json"
_MEMORY = "step/"
_SINCE = frozenset({"usual_norm", "curbed", "phases", "unopened", "roster"})
"""Fields of `RoundRecord` that lines written under earlier protocols lack."""

_NOT_KEPT = frozenset({"config", "out", "resume", "labels"})
"""Options that run.json leaves out: they belong to one command, or are in the plan."""


@dataclass(frozen=True)
class Asked:
    """The clients that a round asked, and what must be known to ask fairly after a restart.

    Attributes:
        round: the round's number.
        attempts: for each attempt the names of the clients asked.
        participations: name → how often the client was asked in the run.
        declined: names of the clients that declined for good.
        missed: name → (how many rounds in a row it did not answer in time, the round from which it is asked again).
    """

    round: int
    attempts: tuple[tuple[str, ...], ...] = ()
    participations: Mapping[str, int] = field(default_factory=dict)
    declined: tuple[str, ...] = ()
    missed: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """A run as its last server left it.

    Attributes:
        plan: the run's plan.
        resumed: the rounds after which it was resumed before.
        joined: name → what the client disclosed when it joined, before the first round.
        asked: the clients of the last round that asked any.
        round: the last finished round; 0 if there is none.
        state: the state after that round; None if the run stopped before its first state was written.
        memory: the server step's memory after that round; empty if the step has none.
        records: one record for each finished round.
        step: the parts of the server step (`Recipe.described`); empty in runs of earlier versions.
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
        """The rounds after which the run was resumed, including now."""
        return *self.resumed, self.round

    @property
    def under_way(self) -> int:
        """The round that the last server may have begun without finishing it."""
        return 0 if self.state is None and self.plan.private_start else self.round + 1

    def check(self, plan: RunPlan, step: Mapping[str, object] | None = None) -> None:
        """Check that the options given now lead to the run's own plan and server step.

        Args:
            plan: the plan that they lead to.
            step: the server step's parts, as `Recipe.described` returns them; None leaves them unchecked.

        Raises:
            ValueError: a value differs. The message names each.
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
    """Replace a file in the run's folder, which must exist. The mode is the umask's, since no content is secret."""
    replace_file(path, content, 0o666, make_folder=False)


def begin(folder: Path, options: Mapping[str, object], plan: RunPlan, joined: Mapping[str, Mapping[str, object]],
          resumed: tuple[int, ...] = (), step: Mapping[str, object] | None = None) -> None:
    """Write run.json: what must be known to resume the run before it has finished a round.

    Args:
        folder: the run's folder.
        options: the options of fedlora-server by name.
        plan: the run's plan.
        joined: name → what the client disclosed when it joined.
        resumed: the rounds after which the run was resumed.
        step: the parts of the server step, as `Recipe.described` returns them.
    """
    kept = {name: value for name, value in options.items() if name not in _NOT_KEPT and value not in (None, {}, ())}
    about = {"options": jsonable(kept), "plan": to_scalars(plan), "joined": joined, "resumed": resumed,
             "step": _plain(step or {})}
    _put(folder / ABOUT, f"{json.dumps(about, indent=1)}\n".encode())


def remember(folder: Path, asked: Asked) -> None:
    """Write asked.json: the clients that a round is about to ask."""
    _put(folder / ASKED, f"{json.dumps(asdict(asked))}\n".encode())


def save(folder: Path, run_id: str, round: int, state: Tensors, memory: Tensors) -> None:
    """Replace the checkpoint atomically: a reader, or a server after a crash, finds the old one or the new one.

    Args:
        folder: the run's folder.
        run_id: the run's id.
        round: the round that has just finished.
        state: every tensor that is not in the base checkpoint, after that round.
        memory: the server step's memory after that round, in any dtypes.
    """
    kept = {**state, **{_MEMORY + name: array for name, array in memory.items()}}
    arrays = {name: np.ascontiguousarray(array) for name, array in kept.items()}
    _put(folder / STATE, to_bytes(arrays, metadata={"run_id": run_id, "round": str(round)}))


def note(folder: Path, record: RoundRecord) -> None:
    """Append a finished round's line to metrics.jsonl. If the disk has no room for all of it, nothing is appended."""
    append_to_file(folder / LINES, _line(record).encode())


LOOK_AGAIN_S = 2.0
"""Seconds between two attempts to write to a full disk."""


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
            say(f"{folder} cannot be written to ({fault.strerror}). The run goes on as soon as it can; Ctrl-C stops it")
        told = True
        stop.wait(LOOK_AGAIN_S)

    outlast(attempt, wait)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the run's folder {folder} was removed while the run lasted, and what it held is lost. "
                         "Nothing more is trained; start the run again, in a folder that stays")


def holds_unfinished_run(folder: Path) -> bool:
    """Return whether the folder's run can be resumed.

    It can if it was begun and is not finished, or if the server died before it could tell all clients that it is.
    """
    if not (folder / ABOUT).exists():
        return False
    try:
        finished = json.loads((folder / REPORT).read_text()).get("ended") == "finished"
    except (OSError, ValueError, AttributeError):
        finished = False
    return not finished or (folder / UNFINISHED).exists()


def summary(folder: Path) -> dict[str, object]:
    """Return how far the folder's run came: `planned` and `finished` rounds, and whether it is `resumable`.

    Raises:
        ValueError: the folder holds no run, or its files are damaged.
    """
    about = _about(folder)
    try:
        finished, planned = 0, int(about["plan"]["rounds"])
        if (folder / STATE).exists():
            with safe_open(folder / STATE, framework="np") as stored:
                finished = int(stored.metadata()["round"])
        return {"planned": planned, "finished": finished, "resumable": holds_unfinished_run(folder)}
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from None


def options_of(folder: Path) -> dict[str, object]:
    """Return the options with which the folder's run was begun, for `fedlora.config.read_config`.

    Raises:
        ValueError: the folder holds no run.
    """
    options: dict[str, Any] = _about(folder)["options"]
    if "trackers" in options:  # before --track, the option named all trackers, and these two were the usual ones
        named = options.pop("trackers")
        track = [*(name for name in named if name not in USUAL_TRACKERS),
                 *(f"no-{name}" for name in ("console", "plots") if name not in named)]
        options |= {"track": track} if track else {}
    return options


def take_up(folder: Path) -> Unfinished:
    """Read the folder's run as its last server left it, and drop the line of an unfinished round from metrics.jsonl.

    Raises:
        ValueError: the folder holds no run, a run of an incompatible FedLoRA version, or damaged files.
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
        raise ValueError(f"--resume: {folder / ABOUT} was not written by this FedLoRA version: {error}. Resume the run "
                         "with the version that began it, or begin a new run") from None
    run_id, round, state, memory = load(folder) if (folder / STATE).exists() else (plan.run_id, -1, None, {})
    if run_id != plan.run_id:
        raise ValueError(f"--resume: {folder / STATE} belongs to run {run_id}, and {ABOUT} to run {plan.run_id}; "
                         "restore the file that belongs to the other")
    records = finished_records(folder, round)
    _put(folder / LINES, "".join(map(_line, records)).encode())
    return Unfinished(plan, resumed, joined, _asked(folder), max(0, round), state, memory, records,
                      about.get("step", {}))


def _plain(step: Mapping[str, object]) -> dict[str, Any]:
    """Return the parts as they read back from JSON, to compare them with those in run.json."""
    plain: dict[str, Any] = json.loads(json.dumps(jsonable(step)))
    return plain


class Stored(NamedTuple):
    """A checkpoint: the state after a round, and the server step's memory (empty in files of earlier versions)."""

    run_id: str
    round: int
    state: Tensors
    memory: Tensors


def load(folder: Path) -> Stored:
    """Read the folder's checkpoint.

    Raises:
        ValueError: the folder has none.
    """
    path = folder / STATE
    if not path.exists():
        raise ValueError(f"{folder} has no {STATE}; no round of that run was finished")
    with safe_open(path, framework="np") as stored:
        about = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    memory = {name.removeprefix(_MEMORY): tensors.pop(name) for name in list(tensors) if name.startswith(_MEMORY)}
    return Stored(about["run_id"], int(about["round"]), tensors, memory)


def finished_records(folder: Path, round: int) -> tuple[RoundRecord, ...]:
    """Return the records in metrics.jsonl up to a round, without changing the file.

    Args:
        folder: the run's folder.
        round: the round of the checkpoint; a line for a later one belongs to a round that is not finished.
    """
    return tuple(record for record in _records(folder / LINES) if record.round <= round)


def _about(folder: Path) -> dict[str, Any]:
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
    """Return the records of all complete lines. A crash may have cut the last line short."""
    records = []
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            records.append(_record(json.loads(line)))
        except json.JSONDecodeError:
            break
    return records


def _line(record: RoundRecord) -> str:
    return json.dumps(jsonable(asdict(record)), allow_nan=False) + "\n"


def _record(values: dict[str, Any]) -> RoundRecord:
    """Return the record that `_line` wrote: lists become tuples, and "nan" and "inf" numbers again."""
    fields = {field.name: values[field.name] for field in dataclasses.fields(RoundRecord)
              if field.name not in _SINCE or field.name in values}
    numbers = {name: float(value) for name, value in fields["evaluation"].items()}
    for name in ("update_norm", "train_loss", "usual_norm"):
        fields[name] = None if fields.get(name) is None else float(fields[name])
    return RoundRecord(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
                       | {"evaluation": numbers})
