"""The privacy report of a client's run: privacy.json and .dsse.json, privacy.md and privacy.svg in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fedlora.files import replace_file
from fedlora.identity import Certificate
from fedlora.plan import PROTOCOL, ROW
from fedlora.privacy import INSECURE_SEED_VARIABLE, About, Ledger, RunTerms
from fedlora.privacy.about import NOTHING
from fedlora.privacy.ledger.lifetime_budget import FILTER_ORDERS
from fedlora.privacy.report import (
    LifetimeAccount,
    LifetimeCharge,
    Mechanism,
    ReportedRun,
    Sums,
    TrainingEntry,
    announced,
    encrypted,
    load_or_create_key,
    privacy_report,
    sign,
    write_report,
)
from fedlora.wire import ARRAY_DTYPES

from . import paths
from .budget import runs_of
from .session import ClientSession
from .spending_chart import spending_chart

POINTS = 12
"""At most this many values of ε are computed for the picture; each takes PRV a tenth of a second or more."""


class Foresight:
    """Computes the figures of the next training's report while the present one trains, in a thread of its own.

    The accountants take a fifth of a second for each number of steps, and remember what they found. A report is written
    before a record is read, so that in short rounds they would be most of what a client does beside its step.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "foresight")
        self._found: Future[None] | None = None

    def begin(self, run: ReportedRun, session: ClientSession) -> None:
        """Begin to compute the figures of the report that will follow if one more training like the last is charged.

        Args:
            run: what is reported now.
            session: the client's session in the run.
        """
        begun = len(session.started)
        if run.private and run.trainings and begun < session.terms.max_participations:
            self._found = self._thread.submit(_compute, replace(run, trainings=[*run.trainings, run.trainings[-1]]),
                                              session.terms, begun + 1)

    def wait(self) -> None:
        """Wait until nothing is being computed. An error is left to whoever computes the figure again."""
        if self._found is not None:
            wait([self._found])


def _compute(run: ReportedRun, terms: RunTerms, begun: int) -> None:
    privacy_report(run)
    terms.epsilon(begun)


def reported_run(session: ClientSession, *, server: str, labels: Sequence[str],
                 refusals: Sequence[tuple[int | None, str]],
                 certificates: Sequence[tuple[Certificate, Certificate]] = (), about: About = NOTHING) -> ReportedRun:
    """Return the facts of a report of what this client has done in its run so far.

    Args:
        session: the client's session in the run.
        server: the server's address.
        labels: the label names that were announced.
        refusals: (round, code) of each refusal that was sent.
        certificates: this client's and the server's, for each pair by which a connection was begun; () without TLS.
        about: what the policy states about the data's use.
    """
    run, terms, ledger, dataset = session.run, session.terms, session.ledger, session.dataset
    name, unit = session.streams.name, terms.unit
    sent = session.state.sizes(run.run_id)
    sizes = {False: session.sketch_layout.num_trained, True: session.trainer.adapted.layout.num_trained}

    def upload_bytes(round: int, attempt: int) -> int:
        size, width = sent.get((round, attempt), (sizes[round > 0], None))
        return size * (width or ARRAY_DTYPES[run.wire_dtype].itemsize)

    trainings = [TrainingEntry(c.round, c.attempt, c.state, c.steps, c.time, terms.noise_multiplier,
                               terms.sampling_rate, upload_bytes(c.round, c.attempt) if c.sha256 else None, c.sha256)
                 for c in ledger.charges(dataset, run.run_id)]
    shapes = session.trainer.shapes
    return ReportedRun(
        dataset=dataset, run_id=run.run_id, client=name, server=server, plan_sha256=terms.plan_sha256,
        strategy=run.strategy, base_model=asdict(run.model), unit=unit,
        declared_size=terms.declared_size if run.private else None, delta=terms.delta,
        mechanism=Mechanism(
            noise_multiplier=terms.noise_multiplier, sampling_rate=terms.sampling_rate,
            expected_batch=run.expected_batch, local_steps=terms.local_steps,
            max_participations=terms.max_participations, clip_norm=terms.clip_norm, scales=terms.scales,
            precision=session.trainer.precision, rows=shapes.rows, one_at_a_time=shapes.one_at_a_time,
            family=run.family, key=run.mechanism),
        trainings=trainings, lifetime=_lifetime(ledger, dataset, terms.delta),
        disclosed=(*announced(client=name, private=run.private, labels=labels or None, protocol=PROTOCOL),
                   *(encrypted(own, peer) for own, peer in certificates)),
        terms_announced=session.limits.announce_size, anchored=session.anchors,
        rows_per_unit=None if unit == ROW else session.limits.rows_per_unit,
        predictable=INSECURE_SEED_VARIABLE if session.streams.predictable else None, refusals=refusals, about=about,
        sums=None if not run.secure_aggregation else Sums(
            terms.aggregate_noise_multiplier, terms.least_members, terms.colluding,
            ledger.rosters(dataset, run.run_id), session.state.revealed(run.run_id),
            run.hold_out))


def write_privacy_report(folder: Path, run: ReportedRun) -> Path:
    """Write and sign a report.

    Args:
        folder: the run's folder.
        run: the facts.

    Returns:
        The path of privacy.json.

    Raises:
        ValueError: the signing key cannot be used.
    """
    return write_report(folder, sign(privacy_report(run), load_or_create_key(paths.signing_key())))


def draw_spending(path: Path, session: ClientSession) -> None:
    """Write the picture of the run's ε against rounds started. Nothing is written if no ε holds or no round started.

    Args:
        path: the SVG file; replaced if it exists.
        session: the client's session in the run. ε is that of the run alone, at the run's own δ.

    Raises:
        OSError: the file cannot be written.
    """
    terms, started, most = session.terms, len(session.started), session.terms.max_participations
    if terms.noise_multiplier is None or terms.delta is None or session.streams.predictable or not started:
        return
    rounds = sorted({started, *np.linspace(1, most, min(most, POINTS), dtype=int).tolist()})
    planned = [(count, terms.epsilon(count)) for count in rounds]
    if not 0 < planned[-1][1] < math.inf:
        return  # no axis can show that
    chart = spending_chart(f"{session.dataset}, run {session.run.run_id}", terms.delta, planned, started)
    replace_file(path, chart.encode())


def _lifetime(ledger: Ledger, dataset: str, delta: float | None) -> LifetimeAccount | None:
    """Return everything in the ledger that counts against the data set's lifetime; None if no δ is known."""
    state = ledger.lifetime(dataset)
    if (state.delta or delta) is None:
        return None
    overlapping = ledger.overlapping(dataset)
    charges = []
    for begun in (run for name in (dataset, *overlapping) for run in runs_of(ledger, name)):
        terms = begun[0].terms
        count = terms.max_participations if terms.run_id == state.closed_by else len(begun)
        spends, sums = terms.spends(count), terms.aggregate_noise_multiplier is not None
        if spends is None:
            charges.append(LifetimeCharge(begun[0].dataset, terms.run_id, None, terms.sampling_rate,
                                          count * terms.local_steps))
        charges += [LifetimeCharge(begun[0].dataset, terms.run_id, one.noise_multiplier, one.sampling_rate, one.steps,
                                   sums) for one in spends or ()]
    given_up = "; ".join(f"ledger {mark['ledger_id']}, {mark['rows']} rows" for mark in ledger.marks())
    return LifetimeAccount(
        epsilon=state.epsilon if state.epsilon != float("inf") else None, delta=state.delta or delta,
        charges=charges, spent=state.spent, remaining=state.remaining, overlapping=overlapping,
        distinct=ledger.distinct(dataset), closed_by=state.closed_by, ledger_id=ledger.ledger_id,
        new_ledger=given_up or ("begun anew by --new-ledger" if ledger.created_anew else None),
        simulated=ledger.simulated, orders=state.declared[0].orders if state.declared else FILTER_ORDERS)
