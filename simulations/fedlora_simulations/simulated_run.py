"""One simulated run: N clients, the server's round loop, and one base model in each process that trains."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch

from fedlora.adapters import attach_planned
from fedlora.adapters.sketches import sketch_plan
from fedlora.config import SimulationConfig
from fedlora.files import allow_open_files
from fedlora.models import load
from fedlora.plan import Tensors
from fedlora.privacy import Ledger, nominal_size
from fedlora.secure_sum.roster import Roster
from fedlora.tasks import Records
from fedlora.training import Trainer
from fedlora_client.flower_app import Session
from fedlora_client.session import ClientSession
from fedlora_client.state import MemoryState
from fedlora_client.terms import Limits
from fedlora_server import checkpoint
from fedlora_server.observer import Observer
from fedlora_server.report import write_report
from fedlora_server.round_state import RoundOptions
from fedlora_server.rounds import FederationResult, Run, run_federation
from fedlora_server.run_setup import (
    BaseModel,
    Federation,
    evaluator,
    fewest_uploads,
    prepare,
    resolved,
)

from .compared_streams import ComparedStreams
from .continued import charge_again, taken_up
from .in_process import InProcessEngine
from .population import Method, Population
from .processes import ProcessWorkers
from .ray_workers import RayWorkers
from .simulated_roster import aggregate_epsilon, local_epsilon, simulated_limits, simulated_roster
from .worker import Blueprint, ThisProcess, Workers, threads_each
from .worker_engine import WorkerEngine

log = logging.getLogger(__name__)

OTHER_FILES = 256
"""Upper bound on the open files that a simulation needs beside one for each client."""


@dataclass(frozen=True)
class Simulated:
    """One run that has ended.

    Attributes:
        method: the method.
        seed: the seed.
        federation: the plan, the adapters and the strategy.
        result: rounds and final state.
        epsilons: client name → ε by the client's accountant, for its own noise; infinite without privacy.
        noise_multipliers: client name → noise multiplier; None without privacy.
        bytes_up: bytes that all clients sent.
        bytes_down: bytes that all clients received.
        seconds: seconds from the start of the first round to the end of the last one. Those of rounds that an
            interrupted command finished are included, as are their bytes.
        delta: largest δ of all clients; None without privacy.
        aggregate_epsilons: client name → ε towards whoever sees the sums alone; empty without secure aggregation.
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
    delta: float | None = None
    aggregate_epsilons: Mapping[str, float] = field(default_factory=dict)


def simulate(options: SimulationConfig, method: Method, seed: int, base: BaseModel, population: Population, *,
             observer: Observer | None = None, out: Path | None = None, go_on: bool = False,
             between: Callable[[str, Session], Session] = lambda name, session: session) -> Simulated:
    """Run one method with one seed to its end.

    Args:
        options: the options of fedlora-simulate.
        method: the method.
        seed: seed of the run.
        base: the base model.
        population: the clients and their rows.
        observer: told what happens in the run.
        out: folder for the run's adapter and report; None writes nothing.
        go_on: go on with the interrupted run in `out`, which `continued.why_not` has nothing against. Its result has
            the bits of a run that was not interrupted. More bytes go down: each client gets the frozen tensors again.
        between: maps a client's name and session to the session that answers in its place. It is used only if all
            clients train in this process, one after the other.

    Raises:
        ValueError: the options do not fit the model, the data or each other.
        Refused: the clients' privacy limits do not allow the plan.
    """
    options = method.options(options)
    needed = fewest_of(options, method, len(population.parts))
    if options.threads is not None:  # the start must be drawn with these threads too
        torch.set_num_threads(options.threads)
    run_id = hashlib.sha256(f"simulation {method} {seed}".encode()).hexdigest()[:16]
    federation = prepare(options, method.strategy, base, population.labels, seed, run_id=run_id,
                         members=len(population.parts))
    trainer = Trainer(federation.adapted, federation.task, device=options.device, precision=options.precision,
                      micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))
    left = None
    if out is not None:
        left = taken_up(out, federation) if go_on else None
        checkpoint.begin(out, vars(options) | {"strategy": [str(method)]}, federation.plan, {},
                         left.resumptions if left else (), federation.strategy.described)
    allow_open_files(len(population.parts) + OTHER_FILES)
    ledger = Ledger(out / "ledger.sqlite" if out else None, simulated=True)
    make_sketch_trainer = cache(lambda: sketch_trainer(options, federation, base))
    sessions = make_sessions(options, federation, trainer, population.records(federation.task), seed, ledger,
                             make_sketch_trainer,
                             population.sizes)
    terms = {name: session.terms for name, session in sessions.items()}
    roster = simulated_roster(federation.plan, terms, federation.strategy.summed)
    if roster is not None:
        for of in terms.values():
            aggregate_epsilon(roster, of, of.max_participations)  # raises where noise cannot be calibrated to it
    if left is not None:
        charge_again(sessions, left.records)
    evaluate = evaluator(federation, population.held_out, device=trainer.device, precision=trainer.autocast_dtype)
    loop = RoundOptions(seed=seed, clients_per_round=options.clients_per_round, min_clients=len(sessions),
                        min_replies=options.min_replies, evaluate_every=options.eval_every, fewest_uploads=needed,
                        round_timeout_s=math.inf, wait_timeout_s=0.0,  # no deadlines, and no client can join later
                        client_ranks=dict(options.client_ranks))
    count = min(options.workers, len(sessions))
    engine = _engine(options, federation, base, trainer, make_sketch_trainer, sessions, count, between, roster)
    try:
        began = time.monotonic()
        run = Run(federation.strategy, federation.state, loop, federation.start, evaluate, out, left)
        result = run_federation(engine, run, observer=observer)
        before = left.records if left else ()
        simulated = Simulated(
            method, seed, federation, result,
            epsilons={name: session.epsilon() if roster is None else local_epsilon(session.terms, len(session.started))
                      for name, session in sessions.items()},
            noise_multipliers={name: of.noise_multiplier for name, of in terms.items()},
            bytes_up=engine.bytes_up + sum(record.bytes_up for record in before),
            bytes_down=engine.bytes_down + sum(record.bytes_down for record in before),
            seconds=time.monotonic() - began + sum(record.seconds for record in before),
            delta=max((of.delta for of in terms.values() if of.delta), default=None),
            aggregate_epsilons={} if roster is None else {
                name: aggregate_epsilon(roster, session.terms, len(session.started))
                for name, session in sessions.items()})
        if out is not None:
            computed = {"device": str(trainer.device), "precision": trainer.precision,
                        "threads": threads_of(options, count)}
            write_report(out, federation, result,
                         options=resolved(options, method.strategy) | {"seed": seed} | computed)
    finally:
        engine.close("the run is over")
        ledger.close()
    return simulated


def _engine(options: SimulationConfig, federation: Federation, base: BaseModel, trainer: Trainer,
            make_sketch_trainer: Callable[[], Trainer], sessions: Mapping[str, ClientSession],
            count: int, between: Callable[[str, Session], Session], roster: Roster | None) -> InProcessEngine:
    """Return the engine that the options ask for.

    Args:
        options: the options of fedlora-simulate.
        federation: the plan and the adapters.
        base: the base model, for workers in other processes.
        trainer: this process's trainer.
        make_sketch_trainer: returns this process's trainer of a private start.
        sessions: client name → session.
        count: number of workers.
        between: maps a client's name and session to the session that answers in its place.
        roster: the roster of a run with secure aggregation; None without.
    """
    run_id, layout = federation.plan.run_id, federation.adapted.layout
    if options.ray_address and options.engine != "ray":
        raise ValueError(f"--ray-address {options.ray_address} needs --engine ray")
    if options.engine == "ray" or count > 1:
        blueprint = Blueprint(federation.plan, base.path, options.device, options.precision, options.micro_batch,
                              threads_of(options, count), options.compile, together=options.batch_clients > 1)
        workers: Workers = (RayWorkers(blueprint, count, options.ray_address) if options.engine == "ray"
                            else ProcessWorkers(blueprint, count))
    elif options.batch_clients > 1:
        workers = ThisProcess(trainer, make_sketch_trainer)
    else:
        answering = {name: between(name, session) for name, session in sessions.items()}
        return InProcessEngine(answering, run_id, layout, roster=roster)
    return WorkerEngine(sessions, run_id, layout, workers, group=options.batch_clients, roster=roster)


def fewest_of(options: SimulationConfig, method: Method, clients: int) -> int:
    """Return how many uploads a round must have; see `fewest_uploads`.

    Args:
        options: the options of fedlora-simulate, with the method's start.
        method: the method.
        clients: the number of clients.

    Raises:
        ValueError: a round may close with fewer, or there are too few or too many clients for secure aggregation.
    """
    return fewest_uploads(options, method.strategy, clients,
                          "the number of files" if options.partition == "files" else "--clients")


def threads_of(options: SimulationConfig, workers: int) -> int:
    """Return the CPU threads of each process that trains: of each of so many workers, or of this process."""
    if options.threads is not None:
        return options.threads
    if options.engine != "ray" and workers == 1:
        return torch.get_num_threads()
    return 1 if options.ray_address else threads_each(workers)


def compiles_here(options: SimulationConfig) -> bool:
    """Return whether this process compiles the model: not for Ray, whose workers may have GPUs that it lacks."""
    return options.compile and options.engine != "ray"


def sketch_trainer(options: SimulationConfig, federation: Federation, base: BaseModel) -> Trainer:
    """Build this process's trainer of a private start (round 0), with a base model of its own.

    If workers train, this process does not need it.
    """
    plan = sketch_plan(federation.plan)
    adapted = attach_planned(load(base.path, plan.task, plan.labels), plan)
    return Trainer(adapted, federation.task, device=options.device, precision=options.precision,
                   micro_batch=options.micro_batch, threads=options.threads, compiled=compiles_here(options))


def make_sessions(options: SimulationConfig, federation: Federation, trainer: Trainer, records: Mapping[str, Records],
                  seed: int, ledger: Ledger, make_sketch_trainer: Callable[[], Trainer] | None = None,
                  sizes: Mapping[str, int] | None = None) -> dict[str, ClientSession]:
    """Make a session for each client. All share the trainers, a cache of frozen tensors and a simulated ledger.

    Args:
        options: the options of fedlora-simulate.
        federation: the plan of the run.
        trainer: trainer of the rounds.
        records: client name → encoded rows.
        seed: seed of the clients' random numbers.
        ledger: the simulated ledger.
        make_sketch_trainer: returns the trainer of a private start; None if the run has no such start.
        sizes: client name → number of privacy units. Unless --declared-size is given, a client's declared size is this
            number rounded down, as a deployed client rounds it. None derives it from the client's records.

    Returns:
        Client name → session.
    """
    limits = simulated_limits(options, len(records))

    def limits_of(name: str) -> Limits:
        if sizes is None or options.declared_size is not None or not limits.private:
            return limits
        return replace(limits, declared_size=nominal_size(sizes[name]))

    shared: dict[str, Tensors] = {}
    run = secrets.token_hex(8)
    return {name: ClientSession(federation.plan, trainer, own, limits_of(name), MemoryState(shared),
                                ComparedStreams(name, seed, run), ledger, name, sketch_trainer=make_sketch_trainer)
            for name, own in records.items()}
