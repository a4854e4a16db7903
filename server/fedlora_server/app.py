"""One run of fedlora-server from start to end: check, listen, await clients, fix the labels, run rounds, report."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from fedlora import data
from fedlora.config import ServerConfig
from fedlora.console import tell_about
from fedlora.data import Rows
from fedlora.plan import GOODBYES, PROTOCOL, Proposal, RunPlan
from fedlora.secure_sum.roster import run_digest
from fedlora.tasks import task_named

from . import checkpoint, label_sets, names, sum_files
from .advice import Advice
from .anchors import default_place
from .audit.log import AuditLog
from .checkpoint import Unfinished
from .folders import claimed_folder, retaken_folder
from .grpc_engine import GrpcEngine, check_address
from .observer import ClientEvent, RoundRecord
from .operations.assembly import Operations
from .operations.assembly import check as check_operations
from .page import FILE
from .peer_lines import PeerFilter, PeerLines
from .progress import Progress
from .registry_engine import RegistryEngine
from .report import write_report
from .round_options import round_options
from .rounds import FederationResult, Run, run_federation
from .run_setup import (
    ANY_LABELS,
    about_the_reduction,
    evaluator,
    find_model,
    held_out,
    planned,
    prepare,
    remarks,
    resolved,
)
from .secure_start import check_options, check_sum
from .settings import settings
from .stopping import Stopping
from .tls import ServerTls
from .trackers import Trackers, Watched, check_installed

Listen = Callable[[Proposal, Path, Callable[[ClientEvent], None]], RegistryEngine]
"""A function that makes the engine from the proposal for clients, the folder for uploads, and a function that is called
with each event."""


@dataclass(frozen=True)
class Served:
    """The outcome of a run of the server.

    Attributes:
        out: the run's folder.
        result: the rounds' outcome; None if the run was stopped before its first round.
        ended: as `FederationResult.ended`, or "suspended" if SIGTERM stopped it.
    """

    out: Path
    result: FederationResult | None
    ended: str

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter, in PEFT's format where PEFT can hold it; None if no round was finished."""
        return self.out / "adapter" if self.result is not None and self.result.rounds else None

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        """One record for each finished round, and one for round 0 if the start was evaluated."""
        return () if self.result is None else self.result.records

    @property
    def figures(self) -> Mapping[str, float]:
        """The figures on the held-out rows when they were evaluated last; empty without --eval-data."""
        return next((record.evaluation for record in reversed(self.records) if record.evaluation), {})


def serve(options: ServerConfig, console: Console, *, listen: Listen | None = None, run_id: str | None = None,
          stopping: Stopping | None = None) -> Served:
    """Run a federation from the first client to the report.

    Args:
        options: the command's options.
        console: shows the coordinator what happens.
        listen: makes the engine; None listens for gRPC at --address.
        run_id: 16 hexadecimal digits; None draws them at random.
        stopping: whether the run is to stop; None for a request that ends the process if it is made twice.

    Raises:
        ValueError: an option is wrong, the port is taken, or the clients announced no usable label set.
        OSError: a file cannot be read or written.
    """
    stopping = stopping or Stopping(console)
    with ExitStack() as held:
        if (begun := _begun(options, listen)) is not None:
            held.enter_context(retaken_folder(begun))
            return _serve(options, console, begun, checkpoint.take_up(begun), listen, run_id, stopping, held)
        out = held.enter_context(claimed_folder(options.out, options.strategy.replace(":", "-")))
        return _serve(options, console, out, None, listen, run_id, stopping, held)


def _serve(options: ServerConfig, console: Console, out: Path, left: Unfinished | None, listen: Listen | None,
           run_id: str | None, stopping: Stopping, held: ExitStack) -> Served:
    if left is not None and left.plan.labels:
        options = replace(options, labels=options.labels or left.plan.labels)
    check_operations(options)
    check_installed(options.trackers)
    rounds = round_options(options)
    check_options(options, over_grpc=listen is None)
    tls = None
    if listen is None:
        check_address(options.address, insecure=options.insecure or options.tls is not None)
        if options.tls is not None:
            tls = ServerTls(options.tls)
            console.print(tls.told())
    base, task = find_model(options), task_named(options.task)
    if options.eval_data is None:
        answer = task.rows.answer
        rows_with = f" with {answer.column}s" if answer else ""
        console.print(f"{task.metric.capitalize()} will not be shown: no --eval-data. Give it a file of held-out rows"
                      f"{rows_with}.")
    rows = held_out(options)
    values = planned(options, options.strategy)
    console.print(settings(options, options.strategy, values))
    for told in (*remarks(options), *about_the_reduction(options, options.strategy)):
        console.print(told)
    most = options.max_participations or values.rounds
    if (possible := rounds.rounds_within(values.rounds, most)) < values.rounds:
        console.print(f"With {options.min_clients} clients and --max-participations {most}, only {possible} of the "
                      f"{values.rounds} rounds can be done; more clients must join.")
    announced = task.has_labels and not options.labels
    protocol = left.plan.protocol if left else PROTOCOL  # the plan that clients compare must not change
    federation = prepare(options, options.strategy, base, ANY_LABELS if announced else options.labels or (),
                         options.seed, run_id=left.plan.run_id if left else run_id, protocol=protocol)
    check_sum(federation.strategy)
    proposal = Proposal(federation.plan.with_open_labels() if announced else federation.plan)
    run_id = proposal.plan.run_id
    before: Mapping[str, Mapping[str, object]] = {}
    if left is not None:
        left.check(proposal.plan, federation.described)
        before = left.joined
        console.print(f"Run {left.plan.run_id} goes on after round {left.round} of {left.plan.rounds}")
    stop = stopping.asked
    tell_about(console, run=run_id)
    watched = Watched(f"{options.strategy}, {base.title}", out, console, resolved(options, options.strategy), run_id,
                      tls.certificate.fingerprint if tls else "", progress=Progress(options.round_timeout),
                      joined=lambda: _joined(engine, before))
    operations = held.enter_context(Operations(options, watched, stopping, tls))
    audit = AuditLog(watched, proposal.plan, stop, lambda reason: trackers.held_up(reason), left)
    trackers = Trackers(options.trackers, watched, {
        "audit": audit, "advice": Advice(watched, lambda line: trackers.said(line)), **operations.trackers})

    def begin(plan: RunPlan, joined: Mapping[str, Mapping[str, object]]) -> None:
        if listen is None:
            checkpoint.begin(out, vars(options), plan, joined, left.resumptions if left else (),
                             federation.described)
            engine.keep_names()

    engine = (listen or _grpc(options, out, left, tls))(proposal, out / "uploads", trackers.client)
    ended = "failed"
    with stopping.by_signals(), _told_sparingly():
        try:
            begin(proposal.plan, before)
            operations.attend(engine)
            console.print(f"Listening on {engine.address}; run {run_id}, results in {out}", soft_wrap=True)
            if "page" in options.trackers:
                console.print(f"To watch the run in a browser, open {out / FILE}", soft_wrap=True)
            with trackers:
                if announced:
                    ended = "labels"
                    labels = _freeze_labels(engine, options, rows, trackers, stop)
                    ended = "failed"
                    if labels:
                        federation = prepare(options, options.strategy, base, labels, options.seed,
                                             run_id=run_id, protocol=protocol)
                if stop.is_set():
                    audit.check()
                    ended = stopping.how()
                    return Served(out, None, ended)
                begin(federation.plan, _joined(engine, before))
                engine.expect(federation.adapted.layout)
                run = Run(federation.strategy, federation.state, rounds, federation.start, evaluator(federation, rows),
                          out, left, None if left is None else sum_files.take_up(out, run_digest(federation.plan)))
                result = run_federation(engine, run, observer=trackers, stop=stop)
                audit.check()
                ended = stopping.how() if result.ended == "stopped" else result.ended
                checkpoint.patiently(partial(write_report, out, federation, result,
                                             options=resolved(options, options.strategy),
                                             joined=_joined(engine, before), audit_head=audit.head),
                                     out, stop, trackers.held_up)
        finally:
            engine.close(GOODBYES["suspended" if ended == "failed" and stopping.goes_on.is_set() else ended])
            operations.close()
    return Served(out, result, ended)


def _begun(options: ServerConfig, listen: Listen | None) -> Path | None:
    """Return the folder of the run to resume: that of --resume, or --out if it holds an unfinished run."""
    if options.resume is None:
        unfinished = listen is None and options.out is not None and checkpoint.holds_unfinished_run(options.out)
        return options.out if unfinished else None
    if listen is not None:
        raise ValueError("--resume works only with fedlora-server. A SuperLink gives every run a new id; leave out "
                         "--resume and start a new run")
    if options.out is not None:
        raise ValueError(f"--resume continues in the run's own folder; leave out --out {options.out}")
    return options.resume


def _joined(engine: RegistryEngine, before: Mapping[str, Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """Return what each client disclosed when it joined, by name: now, and to an earlier server (`before`).

    Clients announce label names only once, so those told to an earlier server are kept. As soon as one client was asked
    to train, the label names of clients that were not asked are left out: nothing used them, and anybody can announce
    any.
    """
    members = engine.members()
    begun = any(member.asked for member in members)
    now = {member.name: {"fedlora_version": member.fedlora_version, "private": member.private,
                         "label_names": list(member.announced_labels if member.asked or not begun else ())}
           for member in members}
    return {**before, **{name: about | {"label_names": about["label_names"] or before.get(name, {}).get(
        "label_names", [])} for name, about in now.items()}}


def _grpc(options: ServerConfig, out: Path, left: Unfinished | None, tls: ServerTls | None) -> Listen:
    return lambda proposal, uploads, notify: GrpcEngine(options.address, proposal, uploads, insecure=options.insecure,
                                                   tls=tls, notify=notify,
                                                   under_way=left.under_way if left else None,
                                                   anchors=default_place(), names=out / names.FOLDER)


def _freeze_labels(engine: RegistryEngine, options: ServerConfig, held_out: Rows | None, trackers: Trackers,
                   stop: threading.Event) -> tuple[str, ...]:
    """Wait for --min-clients clients and return the label set that they announced (`label_sets`); () if stopped.

    Raises:
        ValueError: the set has fewer than two labels, or --eval-data has a label outside of it.
    """
    told = -1
    said: set[tuple[str, str]] = set()
    while True:
        agreed = label_sets.agree({member.name: member.announced_labels for member in engine.members()
                                   if member.ready_at is not None and member.connected}, options.min_clients)
        for name, why in agreed.left_out.items() - said:
            trackers.said(f"The label names of {name} are left out: {why}. If they are right, start again and name all "
                          "labels with --labels")
            said.add((name, why))
        if len(agreed.of) >= options.min_clients:
            break
        if stop.is_set():
            return ()
        if told != len(agreed.of):
            told = len(agreed.of)
            trackers.waiting(options.min_clients, told, None)
        engine.wait((), 0.25)
    labels = agreed.labels
    if len(labels) < 2:
        raise ValueError(f"the first {options.min_clients} clients announced {len(labels)} label names together; "
                         "classification needs two. Name them with --labels")
    if held_out is not None:
        data.check_labels(held_out, labels)
    engine.fix_labels(labels)
    trackers.said(f"The label set is {', '.join(labels)}")
    return labels


@contextmanager
def _told_sparingly() -> Iterator[None]:
    """Within the block, limit log lines about a peer to one a minute (`PeerLines`)."""
    handlers, sparing = tuple(logging.getLogger().handlers), PeerFilter(PeerLines())
    for handler in handlers:
        handler.addFilter(sparing)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(sparing)
