"""One simulated run: N clients, one copy of the base model in each worker process, the server's round loop."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from fedlora import data
from fedlora.adapters import attach_planned
from fedlora.adapters.private import release_plan
from fedlora.data import Rows
from fedlora.files import allow_open_files
from fedlora.models import load
from fedlora.plan import ROW, Tensors, unit_column
from fedlora.privacy import Ledger, nominal_size
from fedlora.tasks import Records, Task
from fedlora.training import BatchedTrainer, Trainer
from fedlora_client.owner import unit_count
from fedlora_client.session import ClientSession, Limits
from fedlora_client.state import MemoryState
from fedlora_server.cohort import RoundOptions
from fedlora_server.observer import Observer
from fedlora_server.planning import BaseModel, Federation, evaluator, held_out, planned, prepare, resolved
from fedlora_server.report import write_report
from fedlora_server.rounds import FederationResult, run_federation

from .in_process import InProcessEngine
from .processes import ProcessWorkers
from .ray_workers import RayWorkers
from .streams import ComparedStreams
from .worker import Blueprint, ThisProcess, Workers, threads_each
from .worker_engine import WorkerEngine

log = logging.getLogger(__name__)

OTHER_FILES = 256
"""Open files that a simulation needs beside those of its clients, at most."""


@dataclass(frozen=True)
class Method:
    """What is compared: a strategy, possibly with an --init of its own, as in "ffa-lora:orthonormal"."""

    strategy: str
    init: str | None

    @classmethod
    def parse(cls, text: str) -> Method:
        strategy, _, init = text.partition(":")
        return cls(strategy, init or None)

    def options(self, options: Namespace) -> Namespace:
        """With this method's start in place of --init."""
        return Namespace(**vars(options) | ({"init": self.init} if self.init else {}))

    def __str__(self) -> str:
        return self.strategy + (f":{self.init}" if self.init else "")


@dataclass(frozen=True)
class Population:
    """The simulated clients' rows.

    Attributes:
        rows: all of them.
        parts: client name → indices into `rows`.
        labels: the label set; () for causal language models.
        held_out: the rows of --eval-data.
    """

    rows: Rows
    parts: Mapping[str, np.ndarray]
    labels: tuple[str, ...]
    held_out: Rows | None
    _encoded: dict[str, Records] = field(default_factory=dict)

    def dealt(self, options: Namespace, seed: int) -> Population:
        """The same rows, as they are dealt with another seed."""
        return Population(self.rows, _deal(options, self.rows, seed), self.labels, self.held_out)

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Client name → its units of privacy."""
        return {name: unit_count(self.rows.take(part)) for name, part in self.parts.items()}

    def records(self, task: Task) -> Mapping[str, Records]:
        """Client name → encoded rows; encoded once, whatever runs with them."""
        for name in self.parts.keys() - self._encoded.keys():
            self._encoded[name] = records = task.encode(self.rows.take(self.parts[name]))
            if records.left_out:
                log.warning("%s: %d rows are left out: no label, or no answer within --max-length", name,
                            records.left_out)
        return self._encoded


def populate(options: Namespace, seed: int) -> Population:
    """Read --data and --eval-data, and deal the former out by --partition, but for rows that lack a label.

    Raises:
        ValueError: there is nothing to read, no label, or no such partition.
    """
    if options.data is None:
        raise ValueError("--data is missing: name a folder or file of training rows")
    rows = data.read(options.data, options.task, columns=options.column,
                     unit=unit_column(options.privacy_unit or ROW), allow_download=options.allow_download)
    labels = options.labels or data.label_names(rows)
    if options.task == "classification" and len(labels) < 2:
        raise ValueError(f"--data {options.data} has {len(labels)} different labels; classification needs at least two "
                         "(--column label=NAME names another column)")
    return Population(rows, _deal(options, rows, seed), labels, held_out(options))


def check_sizes(options: Namespace, methods: Sequence[Method], population: Population, seed: int) -> None:
    """Refuse what a client would, before anything is trained for hours.

    Raises:
        ValueError: with this seed's split a method would sample a client's units too often.
    """
    limits = Limits.of(options, options.privacy_unit or ROW)
    if not limits.private:
        return
    for method in methods:
        batch = planned(method.options(options), method.strategy).batch_size
        for name, size in population.sizes.items():
            try:
                limits.budget(size).sampling_rate(batch)
            except ValueError as error:
                raise ValueError(f"with seed {seed}, {name} has {size} of the records or units, too few for {method}: "
                                 f"{error}. Lower --batch-size, or deal them more evenly (--partition)") from None


def _deal(options: Namespace, rows: Rows, seed: int) -> dict[str, np.ndarray]:
    """Client name → its rows' indices. All rows of one unit go to the same client, but where files are the clients."""
    if options.partition == "files":
        stems = [Path(file).stem for file in rows.files]
        if len(set(stems)) < len(stems) or options.clients not in (None, len(stems)):
            raise ValueError(f"--partition files needs differently named files, one for each client; --data "
                             f"{options.data} has {len(stems)} and --clients is {options.clients}")
        return dict(zip(stems, rows.by_file(), strict=True))
    dealt = np.array([row for row in range(len(rows)) if rows.labels is None or rows.labels[row] is not None], np.int64)
    if not len(dealt):
        raise ValueError(f"--data {options.data} has no row with a label; fill the label column (--column label=NAME "
                         "names another)")
    parts = _split(rows.take(dealt), options.partition, options.clients or 2, seed)
    return {f"client-{i}": dealt[part] for i, part in enumerate(parts)}


def _split(rows: Rows, partition: str, clients: int, seed: int) -> list[np.ndarray]:
    if rows.units is None:
        return data.partition(len(rows), rows.labels, partition, clients, seed)
    _, first, unit_of = np.unique(np.array(rows.units), return_index=True, return_inverse=True)
    labels = None if rows.labels is None else [rows.labels[row] for row in first]
    parts = data.partition(len(first), labels, partition, clients, seed)
    return [np.flatnonzero(np.isin(unit_of, part)) for part in parts]


@dataclass(frozen=True)
class Simulated:
    """How one run ended.

    Attributes:
        result: rounds and final state.
        epsilons: client name → ε that its accountant gives; infinite without privacy.
        bytes_up, bytes_down: of all clients.
        seconds: from the first round's start to the last one's end.
    """

    method: Method
    seed: int
    federation: Federation
    result: FederationResult
    epsilons: Mapping[str, float]
    noise_multipliers: Mapping[str, float | None]
    bytes_up: int
    bytes_down: int
    seconds: float


def simulate(options: Namespace, method: Method, seed: int, base: BaseModel, population: Population, *,
             observer: Observer | None = None, out: Path | None = None) -> Simulated:
    """Run one method with one seed to its end.

    Args:
        options: of fedlora-simulate.
        out: folder for the run's adapter, report and curves; None leaves nothing.
    Raises:
        ValueError: the options do not fit the model, the data or each other.
        Refused: the clients' privacy limits do not allow the plan.
    """
    options = method.options(options)
    if options.threads is not None:  # before the start is drawn, too
        torch.set_num_threads(options.threads)
    run_id = hashlib.sha256(f"simulation {method} {seed}".encode()).hexdigest()[:16]
    federation = prepare(options, method.strategy, base, population.labels, seed, run_id=run_id)
    kind = BatchedTrainer if options.batch_clients > 1 else Trainer
    trainer = kind(federation.adapted, federation.task, device=options.device, precision=options.precision,
                   micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))
    allow_open_files(len(population.parts) + OTHER_FILES)
    ledger = Ledger(out / "ledger.sqlite" if out else None, simulated=True)
    release = cache(lambda: release_trainer(options, federation, base))
    sessions = make_sessions(options, federation, trainer, population.records(federation.task), seed, ledger, release,
                             population.sizes)
    evaluate = evaluator(federation, population.held_out, device=trainer.device, precision=trainer.autocast_dtype)
    loop = RoundOptions(seed=seed, clients_per_round=options.clients_per_round, min_clients=len(sessions),
                        min_replies=options.min_replies, evaluate_every=options.eval_every,
                        round_timeout_s=math.inf, wait_timeout_s=0.0)  # no clock decides, and nobody new can come
    count = min(options.workers, len(sessions))
    engine = _engine(options, federation, base, trainer, release, sessions, count)
    try:
        began = time.monotonic()
        result = run_federation(engine, federation.strategy, federation.plan, federation.state, loop,
                                observer=observer, evaluate=evaluate, out=out, start=federation.start)
        simulated = Simulated(
            method, seed, federation, result,
            epsilons={name: session.epsilon() for name, session in sessions.items()},
            noise_multipliers={name: session.terms.noise_multiplier for name, session in sessions.items()},
            bytes_up=engine.bytes_up, bytes_down=engine.bytes_down, seconds=time.monotonic() - began)
        if out is not None:
            computed = {"device": str(trainer.device), "precision": trainer.precision,
                        "threads": _threads(options, count)}
            write_report(out, federation, result, base.loadable_name,
                         options=resolved(options, method.strategy) | {"seed": seed} | computed)
    finally:
        engine.close("the run is over")
        ledger.close()
    return simulated


def _engine(options: Namespace, federation: Federation, base: BaseModel, trainer: Trainer,
            release: Callable[[], Trainer], sessions: Mapping[str, ClientSession], count: int) -> InProcessEngine:
    """Args: count: of workers."""
    run_id, layout = federation.plan.run_id, federation.adapted.layout
    if options.ray_address and options.engine != "ray":
        raise ValueError(f"--ray-address {options.ray_address} needs --engine ray")
    if options.engine == "ray" or count > 1:
        blueprint = Blueprint(federation.plan, base.path, options.device, options.precision, options.micro_batch,
                              _threads(options, count), options.compile, together=options.batch_clients > 1)
        workers: Workers = (RayWorkers(blueprint, count, options.ray_address) if options.engine == "ray"
                            else ProcessWorkers(blueprint, count))
    elif options.batch_clients > 1:
        workers = ThisProcess(trainer, release)
    else:
        return InProcessEngine(sessions, run_id, layout)
    return WorkerEngine(sessions, run_id, layout, workers, group=options.batch_clients)


def _threads(options: Namespace, workers: int) -> int:
    """Of whoever trains: each of so many workers, or this process."""
    if options.threads is not None:
        return options.threads
    if options.engine != "ray" and workers == 1:
        return torch.get_num_threads()
    return 1 if options.ray_address else threads_each(workers)


def compiles_here(options: Namespace) -> bool:
    """Ray's workers may have GPUs where this process has none."""
    return options.compile and options.engine != "ray"


def release_trainer(options: Namespace, federation: Federation, base: BaseModel) -> Trainer:
    """Of the round before the first, on a base model of its own; where workers train, this process needs none."""
    plan = release_plan(federation.plan)
    adapted = attach_planned(load(base.path, plan.task, len(plan.labels)), plan)
    return Trainer(adapted, federation.task, device=options.device, precision=options.precision,
                   micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))


def make_sessions(options: Namespace, federation: Federation, trainer: Trainer, records: Mapping[str, Records],
                  seed: int, ledger: Ledger, release: Callable[[], Trainer] | None = None,
                  sizes: Mapping[str, int] | None = None) -> dict[str, ClientSession]:
    """A session for each client; all share the trainers, the cache of frozen tensors and a simulated ledger.

    Args:
        sizes: units of privacy of each, from which its declared size is rounded where none is given, as a deployed
            client does; None for those among its records.
    """
    limits = Limits.of(options, options.privacy_unit or ROW)

    def limits_of(name: str) -> Limits:
        if sizes is None or options.declared_size is not None or not limits.private:
            return limits
        return replace(limits, declared_size=nominal_size(sizes[name]))

    shared: dict[str, Tensors] = {}
    run = secrets.token_hex(8)
    return {name: ClientSession(federation.plan, trainer, own, limits_of(name), MemoryState(shared),
                                ComparedStreams(name, seed, run), ledger, name, release=release)
            for name, own in records.items()}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the deviation of a single value is 0."""
    with np.errstate(invalid="ignore"):  # of infinite values
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
