"""The population of a simulation: its methods, its clients and the rows that each of them has."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fedlora import data
from fedlora.config import SimulationConfig
from fedlora.config.values import method as parsed
from fedlora.data import Rows
from fedlora.plan import ROW, unit_column
from fedlora.tasks import Records, Task, read, task_named
from fedlora_client.privacy_gate import unit_count
from fedlora_client.terms import Limits
from fedlora_server.run_setup import held_out, planned

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """One of the methods that are compared: a strategy, if need be with its own --init: "ffa-lora:orthonormal"."""

    strategy: str
    init: str | None

    @classmethod
    def parse(cls, text: str) -> Method:
        """Return the method that this text of --strategy names."""
        return cls(*parsed(text))

    def options(self, options: SimulationConfig) -> SimulationConfig:
        """Return the options with this method's start in place of --init, if it has one."""
        return replace(options, init=self.init or options.init)

    def __str__(self) -> str:
        return self.strategy + (f":{self.init}" if self.init else "")


@dataclass(frozen=True)
class Population:
    """The simulated clients and their rows.

    Attributes:
        rows: the rows of all clients.
        parts: client name → indices into `rows`.
        labels: the label set; () for tasks without labels.
        held_out: the rows of --eval-data; None without it.
    """

    rows: Rows
    parts: Mapping[str, np.ndarray]
    labels: tuple[str, ...]
    held_out: Rows | None
    _encoded: dict[str, Records] = field(default_factory=dict)

    def dealt(self, options: SimulationConfig, seed: int) -> Population:
        """Return the same rows, dealt to the clients with another seed."""
        return Population(self.rows, _deal(options, self.rows, seed), self.labels, self.held_out)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Return the number of privacy units of each client, by client name."""
        return {name: unit_count(self.rows.take(part)) for name, part in self.parts.items()}

    @cached_property
    def digests(self) -> Mapping[str, str | None]:
        """Return the SHA-256 of the rows, of their split, and of the held-out rows, whatever their files are called."""
        split = json.dumps({name: part.tolist() for name, part in self.parts.items()}, sort_keys=True)
        return {"rows_sha256": _digest(self.rows), "split_sha256": hashlib.sha256(split.encode()).hexdigest(),
                "held_out_sha256": None if self.held_out is None else _digest(self.held_out)}

    def records(self, task: Task) -> Mapping[str, Records]:
        """Return the encoded rows of each client, by client name. They are encoded once, for all runs."""
        for name in self.parts.keys() - self._encoded.keys():
            self._encoded[name] = records = task.encode(self.rows.take(self.parts[name]))
            if records.left_out:
                log.warning("%s: %d rows are left out: no label, or no answer within --max-length", name,
                            records.left_out)
        return self._encoded


def _digest(rows: Rows) -> str:
    found = hashlib.sha256()
    for column in (rows.kind, rows.texts, rows.seconds, rows.messages, rows.labels, rows.units, rows.values,
                   rows.otherwise):
        found.update(json.dumps(column, default=str).encode() + b"\n")
    return found.hexdigest()


def populate(options: SimulationConfig, seed: int) -> Population:
    """Read --data and --eval-data, and deal the rows of --data to the clients as --partition says.

    Rows without a label or answer are not dealt, unless each file is a client.

    Raises:
        ValueError: there is no data, fewer than two labels, or no such partition.
    """
    if options.data is None:
        raise ValueError("--data is missing: name a folder or file of training rows")
    task = task_named(options.task)
    rows = read(options.data, options.task, columns=options.column, unit=unit_column(options.privacy_unit or ROW),
                allow_download=options.allow_download, declared=options.labels or (), options=options.read_options())
    labels = options.labels or data.label_names(rows)
    if task.has_labels and len(labels) < 2:
        raise ValueError(f"--data {options.data} has {'one label' if labels else 'no label'}; {task.name} needs at "
                         "least two (--column label=NAME names another column)")
    return Population(rows, _deal(options, rows, seed), labels, held_out(options))


def check_sizes(options: SimulationConfig, methods: Sequence[Method], population: Population, seed: int) -> None:
    """Check, before hours of training, that rounds can be filled, and that every client would accept every method.

    Raises:
        ValueError: a round needs more clients than there are, --delta is too large for a client of this seed's split,
            or a method would sample its units too often.
    """
    for flag, number in (("--clients-per-round", options.clients_per_round), ("--min-replies", options.min_replies)):
        if number is not None and number > len(population.parts):
            raise ValueError(f"{flag} is {number}, and there are {len(population.parts)} clients; lower it, or raise "
                             "--clients")
    limits = Limits.of(options, options.privacy_unit or ROW)
    if not limits.private:
        return
    for method in methods:
        batch = planned(method.options(options), method.strategy).batch_size
        for name, size in population.sizes.items():
            try:
                budget = limits.budget(size)
            except ValueError as error:
                raise ValueError(f"with seed {seed}, {name} has {size} records or units: {error}") from None
            try:
                budget.sampling_rate(batch)
            except ValueError as error:
                raise ValueError(f"with seed {seed}, {name} has {size} records or units, too few for {method}: {error}"
                                 ". Lower --batch-size, or deal them more evenly (--partition)") from None


def _deal(options: SimulationConfig, rows: Rows, seed: int) -> dict[str, np.ndarray]:
    """Return the indices of each client's rows, by client name.

    All rows of one privacy unit go to the same client, unless each file is a client.
    """
    if options.partition == "files":
        stems = [Path(file).stem for file in rows.files]
        if len(set(stems)) < len(stems) or options.clients not in (None, len(stems)):
            raise ValueError(f"--partition files needs one file for each client, all with different names; --data "
                             f"{options.data} has {len(stems)} files and --clients is {options.clients or 'not given'}")
        return dict(zip(stems, rows.by_file(), strict=True))
    dealt = np.array([row for row in range(len(rows)) if rows.answers is None or rows.answers[row] is not None],
                     np.int64)
    answer = task_named(options.task).rows.answer
    if answer is not None and not len(dealt):
        raise ValueError(f"--data {options.data} has no row with a {answer.column}; fill the {answer.column} column "
                         f"(--column {answer.column}=NAME names another)")
    parts = _split(rows.take(dealt), options.partition, options.clients or 2, seed)
    return {f"client-{i}": dealt[part] for i, part in enumerate(parts)}


def _split(rows: Rows, partition: str, clients: int, seed: int) -> list[np.ndarray]:
    if rows.units is None:
        return data.partition(len(rows), rows.labels, partition, clients, seed)
    _, first, unit_of = np.unique(np.array(rows.units), return_index=True, return_inverse=True)
    labels = None if rows.labels is None else [rows.labels[row] for row in first]
    parts = data.partition(len(first), labels, partition, clients, seed)
    return [np.flatnonzero(np.isin(unit_of, part)) for part in parts]
