"""A data holder's part in one run: check the proposal, load the model, answer orders, write the privacy report.

Errors in the data are reported before a server is called. After that, in a private run, no row can end, delay or change
an answer: every decision follows from the options, the policy, the ledger and the server's proposal. A row that the run
cannot use stays in the data set as a null record, which may be sampled and contributes nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedlora import data, models
from fedlora.adapters.sketches import sketch_plan
from fedlora.console import tell
from fedlora.kit import Kit
from fedlora.models import LoadedModel
from fedlora.plan import (
    ROW,
    Proposal,
    Refusal,
    Refused,
    RoundPlan,
    RunPlan,
    Tensors,
    Upload,
)
from fedlora.privacy import (
    Budget,
    BudgetExhausted,
    Forbidden,
    RunTerms,
    four_digits,
    nominal_size,
)
from fedlora.tasks import Records, task_for, task_named
from fedlora.training import Trainer
from fedlora.training.batch_invariance import Findings
from fedlora.wire import Key

from .admission import Cost, ask_size, ask_whether, panel, what_is_trained
from .data_holder import DataHolder
from .installed import check_known, find_model
from .labels import check_declared, how_to_declare, names_to_announce
from .paths import batch_invariance
from .privacy_gate import unit_count
from .round_display import RoundDisplay
from .session import ClientSession
from .session_report import Foresight, draw_spending, reported_run, write_privacy_report
from .sums import SumMember
from .trainers import make_trainer, try_out

log = logging.getLogger(__name__)


class Participation:
    """This client's part in one run. It is admitted when created; the model is loaded with the first order.

    Args:
        holder: the data holder's policy, ledger and data.
        proposal: what the server proposes.

    Raises:
        Refused: the proposal does not fit this client's limits, task, model, labels or budget, or its owner says no.
        ValueError: the data do not fit the proposal of a run without privacy, or the owner's files cannot be written.

    Attributes:
        announced: the label names that the server asked for, which Ready will disclose; () if it did not ask.
        member: answers the server's requests for secure sums; None if the plan has no secure aggregation.
        most_tensor_bytes: the most bytes of tensors that an order may bring.
        failed: whether a round failed on this machine. The owner then has to decide whether to go on: the server
            chooses the tensors, so it could make one round after another fail, each of them charged.
    """

    def __init__(self, holder: DataHolder, proposal: Proposal) -> None:
        options, gate, limits, console = holder.options, holder.gate, holder.limits, holder.console
        plan = proposal.plan
        self._options, self._proposal, self._gate, self._limits = options, proposal, gate, limits
        self._state, self._streams, self._console, self._rows = holder.state, holder.streams, console, holder.rows
        self._tls = holder.tls
        self._session: ClientSession | None = None
        self._charged: tuple[tuple[tuple[int, int], ...], float] | None = None  # the trainings begun, and their ε
        self._foresight = Foresight()
        self._findings = Findings(batch_invariance())
        self.failed = False
        self.member: SumMember | None = None
        limits.check(plan)
        check_known(plan)
        if plan.task != options.task:
            log.error("The server's task is %s and this client's --task is %s; refused. Add --task %s if your data are "
                      "for that.", plan.task, options.task, plan.task)
            raise Refused("policy")
        gate.check_proposal(proposal)
        if plan.secure_aggregation and self._tls is None:
            log.error("The run has secure aggregation, in which clients know each other by their certificates; "
                      "refused. Give --tls DIR (fedlora-client enroll makes the folder).")
            raise Refused("policy")
        if holder.kit is not None:
            self._check_kit(holder, holder.kit)
        gate.check_anchor(proposal.anchor)
        self._model_path = find_model(options, plan, self._rows.kind)
        self.most_tensor_bytes = models.most_adapter_bytes(self._model_path)
        self._labels, self._refusals = self._state.said(plan.run_id)
        self.announced = self._check_labels()
        budget = None
        if plan.private:
            budget, terms = self._admit(holder)
            if plan.secure_aggregation:
                self.member = self._sum_member(terms)
        else:
            console.print(f"Without privacy, this run trains {what_is_trained(plan)}.", markup=False, soft_wrap=True)
        for line in gate.take_charge(budget):
            console.print(line, soft_wrap=True)
        if self.announced:
            self._labels = self.announced
            self._state.save_said(plan.run_id, self._labels, self._refusals)
            console.print(f"Disclosed to the server: the label names {', '.join(self.announced)}")

    def _check_kit(self, holder: DataHolder, kit: Kit) -> None:
        """Hold the server's plan against the coordinator's kit. Its owner is asked about what differs, if possible.

        A run that has begun goes on: its owner was asked then, and its plan cannot change.

        Raises:
            Refused: "policy": a value differs, and nobody accepts it. The log names each.
        """
        gate, plan = self._gate, self._proposal.plan
        differences = kit.differences(plan)
        if not differences or gate.ledger.terms(gate.dataset, plan.run_id) is not None:
            return
        for difference in differences:
            log.error("The server's plan is not the one in the kit %s: %s.", self._options.kit, difference)
        if holder.asks and not self._options.yes and ask_whether(self._console, "Accept the server's values for this "
                                                                 "run?"):
            return
        log.error("Refused. Ask the coordinator which is right: a new kit, or a server started with the kit's values.")
        raise Refused("policy")

    def _check_labels(self) -> tuple[str, ...]:
        """Check the declared labels against the server's set.

        Returns:
            The label names to announce; () unless the server asks for them.

        Raises:
            Refused: "labels": the declared labels are missing or not in the server's set. The rows have no influence.
            ValueError: in a run without privacy, the labels of the rows do not fit.
        """
        plan, rows, declared = self._proposal.plan, self._rows, self._gate.labels
        if not task_named(plan.task).has_labels:
            return ()
        if plan.labels_open:
            if declared is not None or not plan.private:
                return data.in_order(declared or names_to_announce(rows))
            log.error("The server asks for the label names. Under privacy a client tells only names that its owner "
                      "declared, never those that its rows hold. %s",
                      how_to_declare(rows))
            raise Refused("labels")
        check_declared(declared, plan.labels)
        if others := data.rows_in_other_capitals(rows, plan.labels):
            self._console.print(f"{len(others):,} of {len(rows):,} rows have a label that differs from one in the "
                                f"server's set only in capitals, and is read as that one ({rows.where(others[0])} is "
                                "the first).", style="yellow", soft_wrap=True)
        if not plan.private:
            data.check_labels(rows, plan.labels)
        elif others := data.labelled_otherwise(rows, plan.labels):
            self._console.print(f"{len(others):,} OF {len(rows):,} ROWS HAVE A LABEL THAT THE SERVER'S SET LACKS, and "
                                f"are not trained on ({rows.where(others[0])} is the first). The set is: "
                                f"{', '.join(plan.labels)}.", style="bold red", soft_wrap=True)
        return ()

    def _sum_member(self, terms: RunTerms) -> SumMember:
        """Return this client as a member of the run's rosters."""
        assert self._tls is not None, "checked before the terms were settled"
        plan, gate = self._proposal.plan, self._gate

        def told(line: str, key: Key | None) -> None:
            _, number, attempt = key or (None, None, None)
            tell(self._console, line, "sum", round=number, attempt=attempt)

        return SumMember(plan, self._tls.identity, terms, announced=self._limits.announce_size,
                         pins=gate.policy.pins(self._tls.identity().certificate.fingerprint),
                         least=gate.policy.fewest_members, tell=told, reveals=self._note_reveal,
                         note=lambda facts: gate.ledger.note_roster(gate.dataset, plan.run_id, facts))

    def _note_reveal(self, key: Key) -> None:
        try:
            self._state.save_revealed(*key)
        except (ValueError, OSError) as error:
            log.error("That shares were revealed could not be noted for the privacy report: %s", error)

    def _admit(self, holder: DataHolder) -> tuple[Budget, RunTerms]:
        """Settle the run's terms, show what it costs, and ask the owner if someone is there to be asked.

        Returns:
            The run's budget, and its terms.

        Raises:
            Refused: "policy": the policy does not allow the terms, or the owner says no. "budget": the lifetime budget
                does not allow them.
        """
        gate, plan, console = self._gate, self._proposal.plan, self._console
        units = "records" if self._limits.unit == ROW else f"values of {gate.unit_column}"
        budget = self._declare_size(holder, units)
        try:
            terms, book = gate.terms_for(self._limits, budget, plan)
        except BudgetExhausted as error:
            log.error("%s", error)
            raise Refused("budget") from None
        except Forbidden as error:
            log.error("%s", error)
            raise Refused("policy") from None
        if gate.ledger.terms(gate.dataset, plan.run_id) is not None:
            return budget, terms  # the run goes on; its owner was asked when it began
        cost = Cost.of(book, gate.dataset, terms, pinned=gate.policy.members is not None)
        assert cost is not None, "what was settled fits"
        console.print(panel(cost, gate.dataset, f"{budget.declared_size:,} {units}", plan))
        if holder.asks and not self._options.yes and not ask_whether(console):
            log.error("The owner does not take part in run %s.", plan.run_id)
            raise Refused("policy")
        return budget, terms

    def _declare_size(self, holder: DataHolder, units: str) -> Budget:
        """Return the run's budget, for its public size.

        The size is the declared one, else the answer at the terminal, else the number of units rounded down to two
        significant digits.
        """
        gate, count = self._gate, unit_count(self._rows)
        if gate.declared_size is None and holder.asks:
            size = gate.declared_size = ask_size(self._console, nominal_size(count), units)
            if gate.listed:  # a new data set gets its entry, with the size, from `PrivacyGate.take_charge`
                self._console.print(f"To avoid this question in future, write declared-size = {size} under "
                                    f"[dataset.{gate.dataset}] in {gate.policy.path}.", soft_wrap=True)
        self._limits = replace(self._limits, declared_size=gate.declared_size or nominal_size(count))
        return self._limits.budget(count)

    def answer(self, plan: RoundPlan, tensors: Tensors,
               stop: Callable[[], bool] | None = None, display: RoundDisplay | None = None) -> Upload | Refusal:
        """Train for one order, or say why not. An error stays in the local log and sets `failed`.

        The privacy report is brought up to date twice: after the charge and before a record is read, and before the
        upload leaves. So it is complete even if this process is killed and never started again.

        Args:
            plan: the order.
            tensors: the tensors that came with it.
            stop: called between micro-batches; True abandons the round, which stays charged. None stops when the
                round's time is up.
            display: shows the data holder how far the round is.

        Returns:
            What may be sent: the upload, or a refusal.
        """
        display = display or RoundDisplay(None, plan)
        try:
            if self._session is None or self._session.run.run_id != plan.run.run_id:
                self._session = self._open(plan.run)
            part = None if self.member is None else self.member.part(plan.key)
            if self.member is not None and part is None and (plan.round, plan.attempt) not in self._session.started:
                log.warning("Round %d is not begun, and nothing is charged: this process gave no keys for its sum, as "
                            "it was started later. It takes part in the next one.", plan.round)
                return Refusal("unavailable")
            answer = self._session.run_round(plan, tensors, stop, charged=lambda: self._begin_training(display),
                                             stepped=display.stepped, part=part)
            self._write_report()
            return answer
        except Refused as refused:
            return refused.refusal
        except (ValueError, MemoryError, OSError) as error:
            log.error("%s", error)
        except Exception:
            log.exception("Round %d failed, for the reason below; the server is told only that this client is "
                          "unavailable.", plan.round)
        self.failed = True
        return Refusal("unavailable")

    def _begin_training(self, display: RoundDisplay) -> None:
        """Bring the privacy report up to date, now that the training is charged, and begin to show its steps."""
        self._foresight.wait()
        self._write_report(foresee=True)
        session = self._session
        assert session is not None
        spent = "no privacy"
        if self._limits.private and not self._streams.predictable:
            try:
                spent = f"ε {four_digits(self._epsilon(session))} of {four_digits(session.reserved())}"
            except (ValueError, OSError) as error:  # the training is charged, and goes on
                log.error("The ε so far cannot be shown: %s", error)
                spent = ""
        display.training(session.terms.sampling_rate * session.terms.declared_size,
                         "records" if self._limits.unit == ROW else "units", spent)

    def _epsilon(self, session: ClientSession) -> float:
        """Return the ε charged so far. It is computed once for each charge."""
        started = session.started
        if self._charged is None or self._charged[0] != started:
            self._charged = started, session.epsilon()
        return self._charged[1]

    def answer_unattended(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        """Do the same as `answer` where nobody watches, as under a SuperNode that starts a process for each message.

        A mark is kept on disk while the round lasts. If the round fails or its process is killed, the mark stays, and
        all further orders of the run are refused until the owner removes it.

        Args:
            plan: the order.
            tensors: the tensors that came with it.
        """
        run_id = plan.run.run_id
        mark = self._state.unfinished(run_id)
        if mark.exists():
            log.error("A round of run %s failed on this machine or was killed; further rounds could fail the same "
                      "way and be charged. Find the reason in this log, then remove %s to go on with the run.", run_id,
                      mark)
            return Refusal("unavailable")
        self._state.save_unfinished(run_id)
        answer = self.answer(plan, tensors)
        if not self.failed:
            mark.unlink()
        return answer

    def report(self, plan: RoundPlan, answer: Upload | Refusal, declined: Refusal | None = None,
               moved: str = "") -> None:
        """Print one line about a round for the data holder, and note a refusal for the privacy report.

        Args:
            plan: the order.
            answer: what this client answered.
            declined: why the server did not accept the upload; None if it did.
            moved: text to end the line with, such as the bytes sent and received.
        """
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
        refusal = answer if isinstance(answer, Refusal) else declined
        tell(self._console, f"round {plan.round}/{plan.run.rounds}: {line}; {self._spent()}{moved}", "round",
             "warning" if refusal else "info", round=plan.round, attempt=plan.attempt,
             code=refusal.code if refusal else None)

    def conclude(self) -> None:
        """End the run in the ledger, which frees the trainings that it had not begun, and write its privacy report."""
        if self.member is not None:
            self.member.close()
        if self._session is not None:
            try:
                self._session.ledger.end_run(self._session.dataset, self._session.run.run_id)
            except (ValueError, OSError) as error:
                log.error("The ledger could not be told that the run has ended: %s", error)
            self.leave_report()

    def leave_report(self) -> None:
        """Bring the privacy report and its picture up to date, and tell the data holder where they are."""
        report = self._write_report()
        if report is None or self._session is None:
            return
        try:
            draw_spending(report.with_suffix(".svg"), self._session)
        except (ValueError, OSError) as error:
            log.error("The picture of what was spent could not be drawn: %s", error)
        self._console.print(f"What left this machine, and what it cost: {report.with_suffix('.md')}", soft_wrap=True)

    def _write_report(self, *, foresee: bool = False) -> Path | None:
        """Write the privacy report of everything so far.

        Args:
            foresee: begin to compute the figures of the report that the next training will need.

        Returns:
            The path of privacy.json; None if there is nothing to report, or it cannot be written (the log says why).
        """
        session = self._session
        if session is None:
            return None
        try:
            run = reported_run(session, server=self._options.server, labels=self._labels, refusals=self._refusals,
                               certificates=() if self._tls is None else tuple(self._tls.shown),
                               about=self._gate.about)
            path = write_privacy_report(self._state.run_folder(session.run.run_id), run)
            if foresee:
                self._foresight.begin(run, session)
            return path
        except (ValueError, OSError) as error:
            log.error("The privacy report could not be written: %s", error)
            return None

    def _spent(self) -> str:
        session = self._session
        if session is None or not self._limits.private or self._streams.predictable:
            return "no privacy" if session else "nothing was charged"
        return (f"updates released: {session.released}; ε {four_digits(self._epsilon(session))} charged of "
                f"{four_digits(session.reserved())} reserved (δ {session.terms.delta:.4g})")

    def _check_plan(self, run: RunPlan) -> None:
        """Check that the plan is the proposed one and, where labels were still open, that they fit.

        Raises:
            Refused: "policy": the plan was changed. "labels": the labels do not fit.
        """
        if broken := self._proposal.broken_by(run):
            log.error("The plan's %s is not what the server said when this client joined; refused.", broken[0])
            raise Refused("policy")
        if task_named(run.task).has_labels:
            check_declared(self._gate.labels, run.labels)
            if not run.private:
                try:
                    data.check_labels(self._rows, run.labels)
                except ValueError as error:
                    log.error("%s", error)
                    raise Refused("labels") from None

    def _tell_unusable(self, records: Records, unusable: Counter[str] | None) -> None:
        """Tell the data holder how many rows cannot be trained on. The server is not told."""
        if unusable is None and records.left_out:
            self._console.print(f"{records.left_out:,} rows are left out: they have no label, or no answer within "
                                "--max-length.")
        if unusable is not None and records.left_out:
            kinds = ", ".join(f"{kind}: {count:,}" for kind, count in unusable.items() if count)
            self._console.print(f"{records.left_out:,} of {len(self._rows):,} rows are not trained on ({kinds}).")
        if unusable is not None and not len(records):
            self._console.print("NO ROW CAN BE TRAINED ON: what this client sends is noise alone, and is charged.",
                                style="bold red")

    def _open(self, run: RunPlan) -> ClientSession:
        """Load the model and open the session of the run. Called once, with the first order."""
        self._check_plan(run)
        loaded = models.load(self._model_path, run.task, run.labels)
        task = task_for(run, loaded.tokenizer)
        unusable: Counter[str] | None = Counter() if run.private else None
        records = task.encode(self._rows, unusable)
        self._tell_unusable(records, unusable)

        def trainer(plan: RunPlan, model: LoadedModel) -> Trainer:
            return make_trainer(self._options, plan, model, task, self._findings)

        own = trainer(run, loaded)
        try_out(own, run, 1 if records.units is None else self._limits.rows_per_unit)
        session = ClientSession(
            run, own, records, self._limits, self._state, self._streams, self._gate.ledger,
            self._gate.dataset, approve=self._gate.approve, anchors=self._proposal.anchor is not None,
            sketch_trainer=lambda: trainer(sketch_plan(run), models.load(self._model_path, run.task, run.labels)))
        terms = session.terms
        if run.private:
            unit = "record" if self._limits.unit == ROW else self._gate.unit_column
            self._console.print(
                f"Private: in each step every {unit} is sampled with probability {terms.sampling_rate:.4g}; its "
                f"gradient is clipped to {terms.clip_norm:g}, and hidden by noise of {terms.noise_multiplier:.3f} × "
                "that"
                + ("." if self._streams.predictable else
                   f"; all {run.max_participations} rounds{' and the start' if run.private_start else ''} together "
                   f"cost at most ε {self._limits.epsilon:g} at δ {terms.delta:.4g}"
                   + (" in the sums, with the noise of other members." if terms.aggregate_noise_multiplier else ".")))
            if terms.noise_multiplier != session.noise_for_run:
                self._console.print(
                    f"The lifetime budget leaves less than that, so the noise is {terms.noise_multiplier:.3f} × the "
                    f"clip norm instead of {session.noise_for_run:.3f}. `fedlora-client budget` shows what is left.",
                    style="yellow")
        return session
