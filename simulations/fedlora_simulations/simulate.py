"""One simulated run: N clients, one copy of the base model in each worker process, the server's round loop."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from fedlora.adapters import attach_planned
from fedlora.adapters.sketches import sketch_plan
from fedlora.config import SimulationConfig
from fedlora.files import allow_open_files
from fedlora.models import load
from fedlora.plan import ROW, Tensors
from fedlora.privacy import Ledger, nominal_size
from fedlora.tasks import Records
from fedlora.training import Trainer
from fedlora_client.flower_app import Session
from fedlora_client.session import ClientSession, Limits
from fedlora_client.state import MemoryState
from fedlora_server.observer import Observer
from fedlora_server.report import write_report
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import FederationResult, Run, run_federation
from fedlora_server.run_setup import BaseModel, Federation, evaluator, prepare, resolved

from .compared_streams import ComparedStreams
from .in_process import InProcessEngine
from .population import Method, Population
from .processes import ProcessWorkers
from .ray_workers import RayWorkers
from .worker import Blueprint, ThisProcess, Workers, threads_each
from .worker_engine import WorkerEngine

log = logging.getLogger(__name__)

OTHER_FILES = 256
"""Open files that a simulation needs beside those of its clients, at most."""


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


def simulate(options: SimulationConfig, method: Method, seed: int, base: BaseModel, population: Population, *,
             observer: Observer | None = None, out: Path | None = None,
             between: Callable[[str, Session], Session] = lambda name, session: session) -> Simulated:
    """Run one method with one seed to its end.

    Args:
        options: of fedlora-simulate.
        observer: told what happens.
        out: folder for the run's adapter and report; None leaves nothing.
        between: from a client's name and session to what answers in its place; where all train in this process.

    Raises:
        ValueError: the options do not fit the model, the data or each other.
        Refused: the clients' privacy limits do not allow the plan.
    """
    options = method.options(options)
    if options.threads is not None:  # before the start is drawn, too
        torch.set_num_threads(options.threads)
    run_id = hashlib.sha256(f"simulation {method} {seed}".encode()).hexdigest()[:16]
    federation = prepare(options, method.strategy, base, population.labels, seed, run_id=run_id)
    trainer = Trainer(federation.adapted, federation.task, device=options.device, precision=options.precision,
                      micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))
    allow_open_files(len(population.parts) + OTHER_FILES)
    ledger = Ledger(out / "ledger.sqlite" if out else None, simulated=True)
    make_sketch_trainer = cache(lambda: sketch_trainer(options, federation, base))
    sessions = make_sessions(options, federation, trainer, population.records(federation.task), seed, ledger,
                             make_sketch_trainer,
                             population.sizes)
    evaluate = evaluator(federation, population.held_out, device=trainer.device, precision=trainer.autocast_dtype)
    loop = RoundOptions(seed=seed, clients_per_round=options.clients_per_round, min_clients=len(sessions),
                        min_replies=options.min_replies, evaluate_every=options.eval_every,
                        round_timeout_s=math.inf, wait_timeout_s=0.0)  # no clock decides, and nobody new can come
    count = min(options.workers, len(sessions))
    engine = _engine(options, federation, base, trainer, make_sketch_trainer, sessions, count, between)
    try:
        began = time.monotonic()
        run = Run(federation.strategy, federation.state, loop, federation.start, evaluate, out)
        result = run_federation(engine, run, observer=observer)
        simulated = Simulated(
            method, seed, federation, result,
            epsilons={name: session.epsilon() for name, session in sessions.items()},
            noise_multipliers={name: session.terms.noise_multiplier for name, session in sessions.items()},
            bytes_up=engine.bytes_up, bytes_down=engine.bytes_down, seconds=time.monotonic() - began)
        if out is not None:
            computed = {"device": str(trainer.device), "precision": trainer.precision,
                        "threads": _threads(options, count)}
            write_report(out, federation, result,
                         options=resolved(options, method.strategy) | {"seed": seed} | computed)
    finally:
        engine.close("the run is over")
        ledger.close()
    return simulated


def _engine(options: SimulationConfig, federation: Federation, base: BaseModel, trainer: Trainer,
            make_sketch_trainer: Callable[[], Trainer], sessions: Mapping[str, ClientSession],
            count: int, between: Callable[[str, Session], Session]) -> InProcessEngine:
    """Args: count: of workers; between: see `simulate`."""
    run_id, layout = federation.plan.run_id, federation.adapted.layout
    if options.ray_address and options.engine != "ray":
        raise ValueError(f"--ray-address {options.ray_address} needs --engine ray")
    if options.engine == "ray" or count > 1:
        blueprint = Blueprint(federation.plan, base.path, options.device, options.precision, options.micro_batch,
                              _threads(options, count), options.compile, together=options.batch_clients > 1)
        workers: Workers = (RayWorkers(blueprint, count, options.ray_address) if options.engine == "ray"
                            else ProcessWorkers(blueprint, count))
    elif options.batch_clients > 1:
        workers = ThisProcess(trainer, make_sketch_trainer)
    else:
        return InProcessEngine({name: between(name, session) for name, session in sessions.items()}, run_id, layout)
    return WorkerEngine(sessions, run_id, layout, workers, group=options.batch_clients)


def _threads(options: SimulationConfig, workers: int) -> int:
    """Of whoever trains: each of so many workers, or this process."""
    if options.threads is not None:
        return options.threads
    if options.engine != "ray" and workers == 1:
        return torch.get_num_threads()
    return 1 if options.ray_address else threads_each(workers)


def compiles_here(options: SimulationConfig) -> bool:
    """Ray's workers may have GPUs where this process has none."""
    return options.compile and options.engine != "ray"


def sketch_trainer(options: SimulationConfig, federation: Federation, base: BaseModel) -> Trainer:
    """Of the round before the first, on a base model of its own; where workers train, this process needs none."""
    plan = sketch_plan(federation.plan)
    adapted = attach_planned(load(base.path, plan.task, plan.labels), plan)
    return Trainer(adapted, federation.task, device=options.device, precision=options.precision,
                   micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))


def make_sessions(options: SimulationConfig, federation: Federation, trainer: Trainer, records: Mapping[str, Records],
                  seed: int, ledger: Ledger, make_sketch_trainer: Callable[[], Trainer] | None = None,
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
                                ComparedStreams(name, seed, run), ledger, name, sketch_trainer=make_sketch_trainer)
            for name, own in records.items()}
