"""Cells: single runs of a simulation, each in a folder of its own, known by a hash of all that decides its result.

A folder's `cell.json` says which run it holds:

    id         SHA-256 of `identity`, in its canonical JSON
    identity   method, seed, every option that shapes the run with the preset's values filled in, and the hashes of the
               base model, of the training rows with their split, and of the held-out rows
    computed   device, precision and so on: equal results up to rounding whatever they are
    status     "begun", or how the run ended
    result     what it measured, once it has ended (`results.Result`)

Paths, names of columns and the like are not part of the identity: the hashes of what was read are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedlora
from fedlora.config import SimulationConfig, options_of
from fedlora.files import replace_file
from fedlora.plan import PROTOCOL, ROW
from fedlora.training.precision import resolve_device, resolve_precision
from fedlora_server.observer import jsonable
from fedlora_server.run_setup import BaseModel, planned, recipe_of, resolved
from fedlora_strategies import strategy_class

from .population import Method, Population
from .simulated_run import threads_of
from .sweep import ELSEWHERE

FORMAT = 1
"""Format of cell.json. A change of what the identity holds needs a new number."""

FILE = "cell.json"

HOW = ("device", "precision", "threads", "micro_batch", "batch_clients", "compile")
"""Options on which a result depends by rounding alone, and an interrupted run's bits."""

NOT_PART = {name.replace("-", "_") for name in ELSEWHERE.keys() - {"privacy", "task"}} | {
    "model", "clients", "strategy_options", "reduction", "reduction_options", "server_optimizer", "server_lr",
    "server_options", "one_step", "eval_data", "partition", "init", *HOW}
"""Options that are not part of an identity as they were given: what follows from them is, or they change nothing."""


@dataclass(frozen=True)
class Cell:
    """One run that a command asks for.

    Attributes:
        method: the method.
        seed: the seed.
        values: swept option → its value.
        options: the options of fedlora-simulate, with these values.
        identity: all that decides the result.
        computed: how it is computed.
        tuned: option that --tune chose → its value.
    """

    method: Method
    seed: int
    values: Mapping[str, str]
    options: SimulationConfig
    identity: Mapping[str, Any]
    computed: Mapping[str, Any]
    tuned: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, options: SimulationConfig, method: Method, seed: int, base: BaseModel, population: Population, *,
           values: Mapping[str, str], tuned: Mapping[str, str] | None = None) -> Cell:
        """Return the cell of one run.

        Args:
            options: the options of fedlora-simulate, with the values that are swept or were chosen.
            method: the method.
            seed: the seed.
            base: the base model.
            population: the clients and their rows, dealt with this seed.
            values: swept option → its value.
            tuned: option that --tune chose → its value.
        """
        device = resolve_device(options.device)
        computed = {name: getattr(options, name) for name in HOW} | {
            "device": str(device), "precision": resolve_precision(options.precision, device),
            "threads": threads_of(options, min(options.workers, len(population.parts)))}
        return cls(method, seed, values, options, identity(options, method, seed, base, population), computed,
                   tuned or {})

    @property
    def id(self) -> str:
        """SHA-256 of the identity, in hexadecimal digits."""
        return hashlib.sha256(canonical(self.identity)).hexdigest()

    @property
    def name(self) -> str:
        """The name of its folder, unless that is taken."""
        parts = (str(self.method), *(f"{name}={value}" for name, value in self.values.items()), f"seed{self.seed}")
        return re.sub(r"[^\w.=-]+", "-", "-".join(parts))

    def __str__(self) -> str:
        return ", ".join((str(self.method), *(f"{name}={value}" for name, value in self.values.items()),
                          f"seed {self.seed}"))


def identity(options: SimulationConfig, method: Method, seed: int, base: BaseModel,
             population: Population) -> dict[str, Any]:
    """Return all that decides the result of a run, in plain JSON values.

    The arguments are those of `Cell.of`.
    """
    own = method.options(options)
    values = resolved(own, method.strategy)
    shaping = {name: values[name] for name in options_of(SimulationConfig) if name not in NOT_PART}
    preset = planned(own, method.strategy)
    return dict(json.loads(json.dumps(jsonable({
        "format": FORMAT, "fedlora": f"{fedlora.__version__}, protocol {PROTOCOL}", "method": str(method),
        "seed": seed,
        "options": shaping | {
            "clients": len(population.parts), "partition": own.partition, "privacy_unit": own.privacy_unit or ROW,
            "max_participations": own.max_participations or preset.rounds, "init": preset.init},
        "computed": {"precision": resolve_precision(own.precision, resolve_device(own.device))},
        "start_sha256": _digest_of_file((preset.init or "").partition(":")[2]),
        "head_sha256": _digest_of_file((own.init_head or "").partition(":")[2]),
        "strategy": recipe_of(own, method.strategy).described() | {"code": _code(method.strategy)},
        "model": {name: getattr(base.reference, name) for name in ("weights_sha256", "config_sha256",
                                                                  "tokenizer_sha256")},
        "labels": population.labels, **population.digests}))))


def canonical(value: object) -> bytes:
    """Return the one spelling of a JSON value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest_of_file(name: str) -> str | None:
    """Return a SHA-256 over a file, or over the files of a folder; None if there is no such file."""
    path, found = Path(name), hashlib.sha256()
    if not name or not path.exists():
        return None
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            found.update(file.read_bytes())
    return found.hexdigest()


def _code(strategy: str) -> str | None:
    """Return the hash of the file that defines a strategy of the user's own; None for one of FedLoRA's."""
    if ":" not in strategy:
        return None
    module = sys.modules.get(strategy.partition(":")[0]) or sys.modules[strategy_class(strategy).__module__]
    return _digest_of_file(getattr(module, "__file__", None) or "")


@dataclass(frozen=True)
class Kept:
    """A cell's folder, as an earlier command left it.

    Attributes:
        folder: the folder.
        about: the content of its cell.json.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def ended(self) -> bool:
        """Whether the run has ended, whichever way."""
        return bool(self.about["status"] != "begun")


def kept_cell(folder: Path) -> Kept | None:
    """Return what a folder's cell.json says; None if it has none.

    Raises:
        ValueError: the file is damaged, or of a format that this version does not read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["identity"]["format"] != FORMAT:
            raise ValueError(f"{path} is of format {about['identity']['format']}, and this version of FedLoRA reads "
                             f"format {FORMAT}; read it with the version that wrote it")
        if about["id"] != hashlib.sha256(canonical(about["identity"])).hexdigest() or not about["status"]:
            raise ValueError(f"{path} was changed after it was written; remove the folder, and its run is done again")
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged; remove the folder, and its run is done again") from None
    return Kept(folder, about)


class Cells:
    """The cells in a command's folder.

    Args:
        out: the folder; cells are looked for in the folders in it, and in those in its folder `tuning`.

    Raises:
        ValueError: a cell.json is damaged.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        places = [place for top in (out, out / "tuning") if top.is_dir() for place in sorted(top.iterdir())]
        self._kept = {kept.about["id"]: kept for kept in map(kept_cell, filter(Path.is_dir, places)) if kept}

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self, cell: Cell) -> Kept | None:
        """Return the folder that an earlier command made for this cell; None if there is none."""
        return self._kept.get(cell.id)

    def left(self, cells: Iterable[Cell]) -> list[Cell]:
        """Return those of the cells whose run has not ended yet."""
        return [cell for cell in cells if (kept := self.kept(cell)) is None or not kept.ended]

    def begin(self, cell: Cell, *, tuning: bool = False) -> Path:
        """Make an empty folder for the cell, with a cell.json that says "begun", and return it.

        A folder that an interrupted run of the same cell has left is removed.

        Args:
            cell: the cell.
            tuning: make it below `tuning`.
        """
        if (kept := self.kept(cell)) is not None:
            shutil.rmtree(kept.folder)
        parent = self.out / "tuning" if tuning else self.out
        name = cell.name if len(cell.name) <= 120 else f"{cell.name[:100]}-{cell.id[:8]}"
        ends = itertools.chain(("", f"-{cell.id[:8]}"), (f"-{cell.id[:8]}-{number}" for number in itertools.count(2)))
        folder = next(place for end in ends if not (place := parent / f"{name}{end}").exists()
                      or not any(place.iterdir()))
        folder.mkdir(parents=True, exist_ok=True)
        self.write(cell, folder, "begun", None)
        return folder

    def write(self, cell: Cell, folder: Path, status: str, result: Mapping[str, object] | None) -> None:
        """Replace the cell.json of a cell's folder.

        Args:
            cell: the cell.
            folder: its folder.
            status: "begun", or how the run ended.
            result: what it measured; None before its end.
        """
        about = {"id": cell.id, "status": status, "values": dict(cell.values), "tuned": dict(cell.tuned),
                 "given": given(cell.options), "identity": cell.identity, "computed": cell.computed, "result": result}
        plain = json.loads(json.dumps(jsonable(about), allow_nan=False))
        replace_file(folder / FILE, f"{json.dumps(plain, indent=1)}\n".encode(), 0o666)
        self._kept[cell.id] = Kept(folder, plain)

    def forget(self, cell: Cell) -> None:
        """Note that the cell's folder was removed."""
        self._kept.pop(cell.id, None)


def given(options: SimulationConfig) -> list[str]:
    """Return the names of the options that differ from their defaults and shape a run."""
    plain = SimulationConfig()
    return [name for name in options_of(SimulationConfig)
            if name not in NOT_PART - {"partition", "clients", "init", "server_optimizer", "server_lr", "one_step"}
            and name != "privacy" and getattr(options, name) != getattr(plain, name)]
