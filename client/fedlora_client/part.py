"""A data holder's part in a run: check the proposal, read the data, load the model, answer orders, write the report."""

from __future__ import annotations

import logging
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from fedlora import data, models
from fedlora.adapters import attach_planned
from fedlora.adapters.private import release_plan
from fedlora.data import Rows
from fedlora.models import LoadedModel
from fedlora.plan import (
    LONGEST_LABEL,
    MOST_ANNOUNCED,
    ROW,
    Refusal,
    Refused,
    RoundPlan,
    RunPlan,
    Tensors,
    Upload,
)
from fedlora.privacy import INSECURE_SEED_VARIABLE, Budget, RunStreams, run_streams
from fedlora.tasks import task_for
from fedlora.training import Trainer, check_computing
from fedlora.training.batch_invariance import Findings
from fedlora.wire import Setup

from .owner import Owner, limits_of, unit_count
from .places import batch_invariance, default_state
from .reporting import draw_spending, write_privacy_report
from .session import ClientSession, Limits
from .state import FolderState

log = logging.getLogger(__name__)

ROWS_PER_LABEL = 5
"""So many rows has each label name on average, or the column is not announced."""


@dataclass(frozen=True)
class DataHolder:
    """This side of any run: whose data it is, what may be done with it, and what was done before.

    Attributes:
        options: of fedlora-client.
        console: where the data holder is told what happens.
    """

    options: Namespace
    owner: Owner
    limits: Limits
    state: FolderState
    streams: RunStreams
    console: Console

    @classmethod
    def of(cls, options: Namespace, console: Console) -> DataHolder:
        """Open the policy, the ledger and the state, and say what does not protect.

        Raises:
            ValueError: an option is wrong, or one of them cannot be used.
        """
        if options.data is None:
            raise ValueError("--data is missing: name the folder or file with your training rows")
        data.check_there(options.data)
        if options.model and options.model.startswith(("/", ".")) and not Path(options.model).is_dir():
            raise ValueError(f"--model {options.model} is no folder; give that of the base model, or leave it out")
        name = options.name or socket.gethostname()
        check_computing(options.device, options.precision, options.compile)  # not in round 1
        owner = Owner(options)
        limits = limits_of(options, owner)
        streams = run_streams(name)
        if not limits.private:
            console.print("PRIVACY IS OFF (--epsilon inf): what this client sends can reveal its records.",
                          style="bold red")
        if streams.predictable:
            console.print("THE NOISE IS PREDICTABLE (test-only seed set in the environment): no ε holds for this run.",
                          style="bold red")
        if streams.predictable and not owner.ledger.simulated:
            raise ValueError(f"{INSECURE_SEED_VARIABLE} is set: whoever knows the seed can subtract the noise, so no "
                             "real budget covers this run. Unset it, or add --simulated-ledger DIR for made-up data")
        if owner.ledger.simulated:
            console.print("The ledger is a simulated one (--simulated-ledger): no lifetime budget protects this data.",
                          style="yellow")
        return cls(options, owner, limits, FolderState(options.state or default_state(name)), streams, console)

    @property
    def name(self) -> str:
        """This client's, at the server."""
        return self.streams.name

    def close(self) -> None:
        """Let other processes have the ledger's runs and the state."""
        self.owner.ledger.close()
        self.state.close()


class Part:
    """This client's part in one run: the data read and checked, the model loaded once the plan is known.

    Raises:
        Refused: the proposal does not fit this client's limits, model or labels; nothing was read before the first two
            were checked.
        ValueError: the data cannot be used.

    Attributes:
        announced: label names that the server asked for, disclosed when ready; else ().
        most_tensor_bytes: what an order may bring at most.
        failed: whether a round went wrong here. To go on is for the owner to decide: the server could have one failing
            round after another charged, and chooses the tensors on which it fails or not.
    """

    def __init__(self, holder: DataHolder, setup: Setup) -> None:
        options, owner, limits, console = holder.options, holder.owner, holder.limits, holder.console
        limits.check(setup.private)
        owner.check_proposal(setup)
        owner.check_anchor(setup.anchor)
        self._model_path = models.obtain(setup.model, path=model_folder(options.model, setup.model.name),
                                         allow_download=options.allow_download)
        models.check_task(self._model_path, setup.task, setup.max_length)
        self.most_tensor_bytes = models.most_adapter_bytes(self._model_path)
        self._options, self._setup, self._owner, self._limits = options, setup, owner, limits
        self._state, self._streams, self._console = holder.state, holder.streams, console
        self._rows = _read(options, setup, owner.unit_column)
        self._budget = budget = self._check_size() if setup.private else None
        for line in owner.take_charge(self._rows, budget):
            console.print(line, soft_wrap=True)
        self._session: ClientSession | None = None
        self._findings = Findings(batch_invariance())
        self.failed = False
        self._labels, self._refusals = self._state.said(setup.run_id)
        self.announced = names_to_announce(self._rows) if setup.announce_labels else ()
        if self.announced:
            self._labels = self.announced
            self._state.save_said(setup.run_id, self._labels, self._refusals)
            console.print(f"Disclosed to the server: the label names {', '.join(self.announced)}")

    def _check_size(self) -> Budget:
        """Say which size is public, and refuse at once where the run would sample the units too often."""
        limits = self._limits
        budget = limits.budget(unit_count(self._rows))
        try:
            budget.sampling_rate(self._setup.expected_batch)
        except ValueError as error:
            log.error("%s, or a higher max-sampling-rate in %s", error, self._owner.policy.path)
            raise Refused("policy") from error
        # else a server's choice of what is trained on could change n̂, and so have rows counted
        self._limits = replace(limits, declared_size=budget.declared_size)
        units = "records" if limits.unit == ROW else f"values of {self._owner.unit_column}"
        self._console.print(f"Declared size: {budget.declared_size:,} {units}. It is public, for the noise tells of "
                            "it; --declared-size sets it.")
        return budget

    def foresee(self) -> None:
        """Use the time until the first order: the noise of the run takes seconds to find, and is remembered."""
        setup = self._setup
        if self._budget is not None:
            with suppress(ValueError):  # the session says it, if it is asked
                self._budget.noise_multiplier(setup.expected_batch, setup.most_trainings * setup.local_steps)

    def answer(self, plan: RoundPlan, tensors: Tensors,
               stop: Callable[[], bool] = lambda: False) -> Upload | Refusal:
        """Train, or say why not; whatever goes wrong here stays in the local log, and sets `failed`.

        The privacy report lists a training before it reads a record, and an upload before it leaves, so that a process
        that is killed and never started again has left it.
        """
        try:
            if self._session is None or self._session.run.run_id != plan.run.run_id:
                self._session = self._open(plan.run)
            answer = self._session.run_round(plan, tensors, stop, charged=self._write_report)
            self._write_report()
            return answer
        except Refused as refused:
            return refused.refusal
        except (ValueError, MemoryError, OSError) as error:
            log.error("%s", error)
        except Exception:
            log.exception("Round %d failed; the server is told only that this client is unavailable.", plan.round)
        self.failed = True
        return Refusal("unavailable")

    def answer_unattended(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """`answer` where nobody notices that a process ends: after a round that failed, or whose process was killed,
        the run is refused until the owner removes the mark that is left."""
        run_id = plan.run.run_id
        mark = self._state.unfinished(run_id)
        if mark.exists():
            log.error("A round of run %s failed on this machine or was killed, and more could fail alike and be "
                      "charged. Find out why in this log, then remove %s to go on in this run.", run_id, mark)
            return Refusal("unavailable")
        self._state.save_unfinished(run_id)
        answer = self.answer(plan, tensors)
        if not self.failed:
            mark.unlink()
        return answer

    def report(self, plan: RoundPlan, answer: Upload | Refusal, declined: Refusal | None = None,
               moved: str = "") -> None:
        """One line for this client's own user; `moved` ends it."""
        if isinstance(answer, Refusal):
            self._refusals.append((plan.round, answer.code))
            try:
                self._state.save_said(plan.run.run_id, self._labels, self._refusals)
            except OSError as error:
                log.error("The refusal could not be noted for the privacy report: %s", error)
            line = f"declined: {answer}"
        elif declined is not None:
            line = f"trained, but the server declined the upload: {declined}"
        else:
            line = f"sent {answer.steps} steps"
        self._console.print(f"round {plan.round}/{plan.run.rounds}: {line}; {self._spent()}{moved}", soft_wrap=True)

    def conclude(self) -> None:
        """Free what the run had not begun, however it ended, and leave its privacy report."""
        if self._session is not None:
            try:
                self._session.ledger.end_run(self._session.dataset, self._session.run.run_id)
            except (ValueError, OSError) as error:
                log.error("The run could not be ended in the ledger: %s", error)
            self.leave_report()

    def leave_report(self) -> None:
        """Bring the privacy report up to date, with its picture, and say where it is."""
        report = self._write_report()
        if report is None or self._session is None:
            return
        try:
            draw_spending(report.with_suffix(".png"), self._session)
        except (ValueError, OSError) as error:
            log.error("The picture of what was spent could not be drawn: %s", error)
        self._console.print(f"What left this machine, and what it cost: {report.with_suffix('.md')}", soft_wrap=True)

    def _write_report(self) -> Path | None:
        """The privacy report of what was done so far; None where there is nothing to report, or it cannot be."""
        session = self._session
        if session is None:
            return None
        try:
            return write_privacy_report(self._state.run_folder(session.run.run_id), session,
                                        server=self._options.server, labels=self._labels, refusals=self._refusals)
        except (ValueError, OSError) as error:
            log.error("The privacy report could not be written: %s", error)
            return None

    def _spent(self) -> str:
        if self._session is None or not self._limits.private or self._streams.predictable:
            return "no privacy" if self._session else "nothing spent"
        return (f"ε {self._session.epsilon():.2f} of {self._limits.epsilon:g} spent "
                f"(δ {self._session.terms.delta:g})")

    def _open(self, run: RunPlan) -> ClientSession:
        """Load the model once for the run."""
        for field in ("model", "private", "task", "strategy", "max_length", "rounds", "max_participations",
                      "local_steps", "expected_batch", "clip_norm", "wire_dtype", "private_start"):
            if getattr(run, field) != getattr(self._setup, field):
                log.error("The plan's %s is not what the server said when this client joined.", field)
                raise Refused("policy")
        if run.task == "classification":
            try:
                data.check_labels(self._rows, run.labels)
            except ValueError as error:
                log.error("%s", error)
                raise Refused("labels") from None
        loaded = models.load(self._model_path, run.task, len(run.labels))
        task = task_for(run, loaded.tokenizer)
        records = task.encode(self._rows)
        if records.left_out:
            self._console.print(f"{records.left_out} rows are left out: no label, or no answer within --max-length.")

        def trainer(plan: RunPlan, model: LoadedModel) -> Trainer:
            options = self._options
            return Trainer(attach_planned(model, plan), task, device=options.device, precision=options.precision,
                           micro_batch=options.micro_batch, threads=options.threads, compiled=options.compile,
                           findings=self._findings)

        own = trainer(run, loaded)
        if run.private:
            own.rehearse()
            own.show_batch_invariance(run, 1 if records.units is None else self._limits.rows_per_unit)
        session = ClientSession(
            run, own, records, self._limits, self._state, self._streams, self._owner.ledger,
            self._owner.dataset, approve=self._owner.approve, anchors=self._setup.anchor is not None,
            release=lambda: trainer(release_plan(run), models.load(self._model_path, run.task, len(run.labels))))
        terms = session.terms
        if run.private:
            unit = "record" if self._limits.unit == ROW else self._owner.unit_column
            self._console.print(
                f"Private: every {unit} is sampled with rate {terms.sampling_rate:.4g}, clipped to "
                f"{terms.clip_norm:g}, and hidden by noise of {terms.noise_multiplier:.3f} × that"
                + ("." if self._streams.predictable else
                   f"; all {run.max_participations} rounds{' and the start' if run.private_start else ''} together "
                   f"cost at most ε {self._limits.epsilon:g} at δ {terms.delta:g}."))
            if terms.noise_multiplier != session.noise_for_run:
                self._console.print(
                    f"The lifetime budget leaves less than that: the noise is {terms.noise_multiplier:.3f} × the clip "
                    f"norm in place of {session.noise_for_run:.3f}. `fedlora-client budget` shows what is left.",
                    style="yellow")
        return session


def names_to_announce(rows: Rows) -> tuple[str, ...]:
    """The label names that the server asked for, where they can be names: texts must not leave this machine as such.

    Raises:
        ValueError: one is long or not printable, or there are too many for so few rows. None is shown.
    """
    remedy = "It would be told to the server. Name the right column with --column label=NAME, or have the server " \
             "started with --labels"
    names, labelled = data.label_names(rows), 0
    for row, label in enumerate(rows.labels or ()):
        labelled += label is not None
        if label is not None and not (len(label) <= LONGEST_LABEL and label.isprintable()):
            raise ValueError(f"{rows.where(row)}: the label is no name of a class: it has {len(label)} characters, and "
                             f"at most {LONGEST_LABEL} printable ones are announced. {remedy}")
    if len(names) > max(2, min(MOST_ANNOUNCED, labelled // ROWS_PER_LABEL)):
        raise ValueError(f"the label column has {len(names)} different values in {labelled} rows, and looks like texts "
                         f"(at most {MOST_ANNOUNCED} names are announced, of {ROWS_PER_LABEL} rows each). {remedy}")
    return names


def model_folder(model: str | None, planned: str) -> Path | None:
    """The folder that --model names; None where the plan's model is meant, whose commit a shared file may leave out.

    Raises:
        ValueError: it is neither.
    """
    if model and Path(model).is_dir():
        return Path(model)
    if model and model not in (planned, planned.partition("@")[0]):
        raise ValueError(f"--model {model} is neither a folder nor the plan's {planned}; give the folder of the base "
                         "model, or leave it out")
    return None


def _read(options: Namespace, setup: Setup, unit_column: str | None) -> Rows:
    """The training rows, checked against what the server said."""
    rows = data.read(options.data, setup.task, columns=options.column, unit=unit_column,
                     allow_download=options.allow_download)
    if setup.task == "classification":
        if rows.labels is None or not data.label_names(rows):
            raise ValueError(f"--data {options.data} has no labels; classification needs a label column "
                             "(--column label=NAME names another)")
        if setup.labels:
            data.check_labels(rows, setup.labels)
    return rows
