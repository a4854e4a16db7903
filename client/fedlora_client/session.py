"""The client's core, which answers an order to train with an upload or a refusal. It uses no Flower and no sockets.

A round has these steps. Each is on disk before the next one begins:

1. The ledger charges the training.
2. The records are read and trained on, and the noised upload is stored.
3. The ledger notes that the upload is stored.
4. The ledger notes that the upload is released. Then it leaves.

If the process dies in between, the round stays charged. If it dies after the third step, the same bytes are sent again
at no further cost.

In a run with secure aggregation the cohort is checked before the first step, and the upload is the masked sum.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_RECEIVED, MOST_VALUE
from fedlora.adapters.sketches import sketch_layout, sketch_plan
from fedlora.plan import Refusal, Refused, Released, RoundPlan, RunPlan, Tensors, Upload, plan_digest
from fedlora.privacy import BudgetExhausted, Forbidden, Ledger, RunStreams, RunTerms
from fedlora.privacy.ledger import Reservation
from fedlora.privacy.mechanisms import Noise
from fedlora.secure_sum import statements
from fedlora.secure_sum.integers import Grid
from fedlora.secure_sum.packages import SUM, sent_digest
from fedlora.tasks import Records
from fedlora.training import Encoding, Trainer, TrainingJob, TrainResult
from fedlora.training.adjustments import check_adjustment
from fedlora.training.hold_out import parted
from fedlora.wire import rounded, tensors_digest

from .state import State
from .sum_part import SumPart
from .terms import Limits, private_terms, with_room

log = logging.getLogger(__name__)


class ClientSession:
    """One client's part in one run: it fixes the run's terms, charges each training and makes the uploads.

    Args:
        run: the plan of the run; a round that carries another plan is refused.
        trainer: the process's trainer; all simulated clients share one.
        records: this client's encoded training records.
        limits: what the data holder allows.
        state: where the last upload and the frozen tensors are kept.
        streams: the source of this client's random numbers, under its name.
        ledger: the ledger that the run is charged to.
        dataset: id of the data set that is charged.
        approve: called with the terms before they are used; raises `Forbidden` if the owner's policy does not allow
            them.
        sketch_trainer: makes the trainer for round 0; needed for a plan with a private start only.
        anchors: whether the server keeps anchors.

    Raises:
        Refused: "privacy-mismatch": one side trains with privacy and the other without. "policy": the plan cannot be
            followed within the limits. "budget": the lifetime budget does not allow the run. The reason is in the
            local log.
        ValueError: no record of a run without privacy can be trained on, or the plan's adjustment does not fit the
            adapter.

    Attributes:
        terms: sampling rate, noise multiplier, clip norm and so on; fixed for the run.
        noise_for_run: the noise multiplier that follows from --epsilon alone; None without privacy. The one in `terms`
            is larger if the lifetime budget leaves less.
        anchors: whether uploads carry the ledger's anchor: the ledger is real and the server keeps anchors.
    """

    def __init__(self, run: RunPlan, trainer: Trainer, records: Records, limits: Limits, state: State,
                 streams: RunStreams, ledger: Ledger, dataset: str, *,
                 approve: Callable[[RunTerms], None] = lambda terms: None,
                 sketch_trainer: Callable[[], Trainer] | None = None, anchors: bool = False) -> None:
        limits.check(run)
        check_adjustment(run.adjustment, trainer.adapted.layout)
        if not (len(records) or run.private):  # a private client without usable records sends noise alone
            raise ValueError("no row can be trained on: every row lacks a label, or an answer within --max-length")
        self.run, self.trainer, self.records = run, trainer, records
        self._trained_on, held_out = parted(records, run.hold_out)
        self._held_out = held_out if run.counted else None
        self.limits, self.state, self.streams = limits, state, streams
        self.ledger, self.dataset = ledger, dataset
        self._sketch_trainer, self.anchors = sketch_trainer, anchors and not ledger.simulated
        self._reserved: float | None = None
        self._begun: dict[tuple[str, int, int], tuple[Reservation, Tensors, SumPart | None]] = {}
        self.terms = self._settle()
        try:
            approve(self.terms)
            ledger.begin_run(dataset, self.terms)
        except Forbidden as error:
            log.error("%s", error)
            raise Refused("policy") from None
        except BudgetExhausted as error:
            log.error("%s", error)
            raise Refused("budget") from None

    def _settle(self) -> RunTerms:
        """Return the run's terms: the stored ones if the run has begun, else new ones that fit the lifetime budget.

        Raises:
            Refused: "policy": the plan or the limits have changed since the run began.
        """
        fresh = self._terms_for_this_run()
        self.noise_for_run = fresh.noise_multiplier
        known = self.ledger.terms(self.dataset, self.run.run_id)
        if known is None:
            found = fresh if fresh.noise_multiplier is None else with_room(
                fresh, lambda terms: self.ledger.fits(self.dataset, terms))
            return found or fresh  # for `Ledger.begin_run` to refuse
        if known.plan_sha256 != fresh.plan_sha256:
            log.error("The server changed the plan of run %s during the run; refused.", self.run.run_id)
            raise Refused("policy")
        same = dataclasses.replace(fresh, noise_multiplier=known.noise_multiplier,
                                   aggregate_noise_multiplier=known.aggregate_noise_multiplier) == known
        if not (same and _keeps(known.noise, fresh.noise)):
            log.error("Run %s was begun with %s; the options and the data now require %s. The terms cannot change "
                      "during a run: start with the options and data of before, or take part in a new run.",
                      self.run.run_id, known, fresh)
            raise Refused("policy")
        return known

    def _terms_for_this_run(self) -> RunTerms:
        """Return the terms that follow from the plan and the limits, without regard to what was spent before."""
        limits, run, count = self.limits, self.run, self.records.units_count
        plan_sha256 = plan_digest(run)
        scales = {"adapter": run.adapter_scale, "head": run.head_scale}
        if run.private:
            try:
                return private_terms(limits, limits.budget(count), run, plan_sha256, scales)
            except ValueError as error:
                log.error("%s", error)
                raise Refused("policy") from error
        size = limits.declared_size or count
        return RunTerms(
            run_id=run.run_id, plan_sha256=plan_sha256, unit=limits.unit, declared_size=size,
            sampling_rate=min(1.0, run.expected_batch / size), noise_multiplier=None, delta=None,
            clip_norm=min(run.clip_norm, limits.max_clip_norm), scales=scales, local_steps=run.local_steps,
            max_participations=run.most_trainings)

    @property
    def started(self) -> tuple[tuple[int, int], ...]:
        """(round, attempt) of every training that was begun, whether or not its upload was sent."""
        return tuple((charge.round, charge.attempt) for charge in self.ledger.charges(self.dataset, self.run.run_id)
                     if charge.state != "voided")

    def epsilon(self) -> float:
        """Return the ε charged so far in this run, for what the owner's policy charges; infinite without privacy."""
        return self.ledger.epsilon(self.dataset, self.run.run_id)

    def reserved(self) -> float:
        """Return the ε of all trainings that the run may begin, which is reserved while it lasts.

        It is infinite without privacy.
        """
        if self._reserved is None:  # the terms are fixed for the run
            self._reserved = self.terms.epsilon(self.terms.max_participations)
        return self._reserved

    @property
    def released(self) -> int:
        """Number of updates that have left this machine or are about to."""
        return sum(charge.state == "released" for charge in self.ledger.charges(self.dataset, self.run.run_id))

    def run_round(self, plan: RoundPlan, tensors: Tensors, stop: Callable[[], bool] | None = None,
                  charged: Callable[[], object] = lambda: None,
                  stepped: Callable[[int], object] = lambda steps: None,
                  part: SumPart | None = None) -> Upload | Refusal:
        """Train once for `plan`, starting from `tensors`.

        Args:
            plan: the order. A (run, round, attempt) that was trained before is not trained again: it gets the stored
                upload, or a refusal if there is none.
            tensors: the trained tensors, and the frozen ones unless this client holds them already.
            stop: called between micro-batches; True abandons the round, which stays charged. None stops when the
                round's time is up.
            charged: called once the charge is on disk and before the training.
            stepped: told after every step how many are done. It must return at once.
            part: this client's part in the sum of this attempt; None in a run without secure aggregation.

        Returns:
            What may be sent: the upload, or a refusal.

        Raises:
            LedgerError: the charge cannot be written; nothing was trained.
        """
        prepared: list[Trainer] = []
        training = self.begin(plan, tensors, lambda: prepared.append(self._prepared_trainer(plan)), part)
        if not isinstance(training, TrainingJob):
            return training
        charged()
        return self.finish(plan, prepared[0].train(training, stop or (lambda: plan.is_late), stepped))

    def begin(self, plan: RoundPlan, tensors: Tensors,
              prepare: Callable[[], object] = lambda: None,
              part: SumPart | None = None) -> TrainingJob | Upload | Refusal:
        """Do everything in `run_round` that comes before the training. The charge is on disk when this returns a job.

        Args:
            plan: the order.
            tensors: the trained tensors, and the frozen ones unless this client holds them already.
            prepare: called right before the charge. Everything that can fail without a record should fail here, as a
                failure then costs nothing.
            part: this client's part in the sum of this attempt; None in a run without secure aggregation.

        Returns:
            The job, to be trained once by any trainer and then given to `finish`; or an answer that needs no training.

        Raises:
            LedgerError: the charge cannot be written.
        """
        if plan.run != self.run:
            log.error("Round %d came with another plan than the run began with; refused.", plan.round)
            return Refusal("policy")
        started = self.started
        if (plan.round, plan.attempt) in started:
            return self._again(plan)
        layout = self.trainer.adapted.layout if plan.round else self.sketch_layout
        try:
            _check_time(plan)
            self._check_turn(plan, [round for round, _ in started])
            active = _in_round(layout, plan)
            start = active.cut(self._complete(plan, tensors, layout))
            encoding = self._encoding(plan, part, layout.num_trained + self.run.counted)
            width = 4 if part is None else part.grid.dtype.itemsize
            self._check_room(plan.round, width * (active.num_trained + self.run.counted))
            if part is not None:
                self._accept(part, plan, {spec.name: tensors[spec.name] for spec in layout.trained})
            prepare()
            _check_time(plan)  # from here to the charge nothing takes long
        except Refused as refused:
            return refused.refusal
        try:
            reservation = self.ledger.reserve(self.dataset, self.run.run_id, plan.round, plan.attempt)
        except BudgetExhausted as error:
            log.error("%s", error)
            return Refusal("budget")
        reservation.begin()
        self._begun[plan.key] = reservation, start, part
        terms, run = self.terms, self.run if plan.round else sketch_plan(self.run)
        return TrainingJob(
            run, self._trained_on, start, sampling_rate=terms.sampling_rate, noise_multiplier=terms.noise_multiplier,
            clip_norm=terms.clip_norm, lr=plan.lr if plan.round else run.lr,
            rows_per_unit=self.limits.rows_per_unit, streams=self.streams, round=plan.round, attempt=plan.attempt,
            active=plan.active, prefixes=plan.prefixes, encoding=encoding, held_out=self._held_out)

    def _encoding(self, plan: RoundPlan, part: SumPart | None, values: int) -> Encoding | None:
        """Check a part in a sum against the plan, and return how this client's clipped sum is encoded for it.

        Args:
            plan: the order.
            part: the part; None if there is none.
            values: number of values in a vector of all trained tensors.

        Returns:
            The encoding; None without secure aggregation.

        Raises:
            Refused: "policy": the plan has secure aggregation and there is no part, or the other way round; or the
                part's numbers are not the plan's, or ask for more noise than this client adds. The reason is in the
                local log.
        """
        run, terms = self.run, self.terms
        if part is None and not run.secure_aggregation:
            return None
        if part is None or not run.secure_aggregation:
            log.error("Round %d was ordered %s a secure sum, which this run's plan %s; refused.", plan.round,
                      *(("without", "asks for") if part is None else ("with", "does not have")))
            raise Refused("policy")
        assert terms.noise_multiplier is not None, "a plan with secure aggregation is private"
        deviation = terms.noise_multiplier * part.grid.sensitivity(part.values, terms.clip_norm)
        fitting = Grid.fitting(values, clip_norm=run.clip_norm, expected_batch=run.expected_batch,
                               members=run.least_members, noise=0.0)
        if (part.values, part.grid.clip_norm, part.grid.fraction_bits, part.grid.most) != (
                values, fitting.clip_norm, fitting.fraction_bits, fitting.most):
            log.error("The secure sum of round %d has %d values on the grid %s; for the %d values of this run it must "
                      "be %s; refused.", plan.round, part.values, part.grid, values, fitting)
            raise Refused("policy")
        if deviation < part.noise:
            log.error("The secure sum of round %d asks each client for noise of %g units of the grid, and the terms of "
                      "this one add %g; refused.", plan.round, part.noise, deviation)
            raise Refused("policy")
        return Encoding(part.grid, deviation)

    def _accept(self, part: SumPart, plan: RoundPlan, trained: Tensors) -> None:
        """Have the part check the cohort and the tensors that it starts from.

        Raises:
            Refused: "policy": this client does not take part in such a sum. "unavailable": a member sealed shares that
                cannot be opened. The reason is in the local log.
        """
        try:
            part.accept(sent_digest(tensors_digest(trained), plan.frozen_sha256))
        except statements.Unreadable as error:
            log.error("Round %d is not begun, and nothing is charged: %s. Tell the coordinator which member it was.",
                      plan.round, error)
            raise Refused("unavailable") from None
        except statements.Refused as error:
            log.error("Round %d is refused, and nothing is charged: %s.", plan.round, error)
            raise Refused("policy") from error

    def finish(self, plan: RoundPlan, result: TrainResult) -> Upload | Refusal:
        """Do everything in `run_round` that comes after the training.

        Args:
            plan: the order.
            result: the result of the job that `begin` returned for this order.

        Returns:
            What may be sent: the upload, or a refusal if the training was stopped early.
        """
        reservation, start, part = self._begun.pop(plan.key)
        if result.steps < self.run.local_steps:
            log.info("Round %d was stopped before its last step; it stays charged.", plan.round)
            return Refusal("unavailable")
        if result.nonfinite:
            log.warning("Round %d: the gradients of %d drawn records were not finite and were counted as zero.",
                        plan.round, result.nonfinite)
        private, announced = self.run.private, self.limits.announce_size
        tensors = result.tensors
        if plan.round == 0:
            tensors = {name: array - start[name] for name, array in tensors.items()}
        if part is None:
            tensors = rounded(tensors, self.run.wire_dtype)
        else:
            try:
                tensors = {SUM: part.masked(tensors[SUM])}
            except statements.Refused as error:
                log.error("Round %d stays charged, and nothing of it is sent: %s.", plan.round, error)
                return Refusal("policy")
        upload = Upload(
            *plan.key, tensors=Released(tensors), steps=result.steps,
            delta=self.terms.delta if announced else None,
            noise_multiplier=self.terms.noise_multiplier if announced else None,
            num_examples=None if private else self.records.units_count,
            train_loss=None if private else result.mean_loss)
        self.state.save_upload(upload)
        self.state.note_size(upload)
        reservation.stored(tensors_digest(upload.tensors))
        reservation.released()
        return self._anchored(upload)

    def _check_turn(self, plan: RoundPlan, started: list[int]) -> None:
        """Check that this round may follow those that were begun.

        Args:
            plan: the order.
            started: the round numbers of all trainings that were begun.

        Raises:
            Refused: "policy": a start from gradients is not planned or comes too late. "unavailable": it was begun
                before. "budget": no further training is allowed. The reason is in the local log.
        """
        if plan.round == 0:
            if not self.run.private_start or any(started):
                log.error("The server asks for gradients to initialise the adapter, %s; refused.",
                          "but training has begun" if self.run.private_start else "which is not in this run's plan")
                raise Refused("policy")
            if started:
                log.warning("The gradients to initialise the adapter are released only once, and that was begun "
                            "before; refused.")
                raise Refused("unavailable")
        elif (rounds := sum(map(bool, started))) >= self.run.max_participations:
            log.warning("This client has started %d rounds, the most that its noise was calibrated to; refused.",
                        rounds)
            raise Refused("budget")

    @property
    def sketch_layout(self) -> AdapterLayout:
        """The layout of the tensors of round 0, in which gradients are released to initialise the adapter."""
        return sketch_layout(self.run, self.trainer.adapted.layout, self.trainer.adapted.missing)

    def _prepared_trainer(self, plan: RoundPlan) -> Trainer:
        """Return the trainer for the round, after checking that it is batch-invariant.

        Round 0 trains another adapter on a second copy of the base model, which is needed only once.
        """
        trainer, run = self.trainer, self.run
        if plan.round == 0:
            if self._sketch_trainer is None:
                raise ValueError("this session was made without a trainer for a private start; give it "
                                 "`sketch_trainer`")
            trainer, run = self._sketch_trainer(), sketch_plan(self.run)
        if run.private:
            rows_per_unit = 1 if self.records.units is None else self.limits.rows_per_unit
            trainer.activate(plan.active, plan.prefixes)
            trainer.show_batch_invariance(run, rows_per_unit)
        return trainer

    def _again(self, plan: RoundPlan) -> Upload | Refusal:
        """Answer an order that was begun before: with the stored upload's identical bytes, which costs nothing more.

        An order that was begun and not finished is refused.
        """
        stored = self.state.stored_upload(plan)
        if stored is None or not self.ledger.is_stored(self.dataset, *plan.key):
            log.warning("Round %d, attempt %d was begun before and not finished; it is not trained again.",
                        plan.round, plan.attempt)
            return Refusal("unavailable")
        self.ledger.released_again(self.dataset, *plan.key, tensors_digest(stored.tensors))
        log.info("Round %d was trained before; the stored upload is sent again at no further cost.", plan.round)
        return self._anchored(stored)

    def _anchored(self, upload: Upload) -> Upload:
        """Add the ledger's anchor to an upload whose release is on disk, so that the anchor covers the release."""
        return dataclasses.replace(upload, anchor=self.ledger.anchor()) if self.anchors else upload

    def _check_room(self, round: int, num_bytes: int) -> None:
        """Check that the disk has room for the upload. A round that is refused here is not begun and costs nothing.

        Raises:
            Refused: "unavailable": there is not enough room.
        """
        try:
            self.state.check_room(num_bytes)
        except OSError as error:
            log.error("Nothing is trained or charged in round %d: %s", round, error.strerror)
            raise Refused("unavailable") from None

    def _complete(self, plan: RoundPlan, tensors: Tensors, layout: AdapterLayout) -> Tensors:
        """Add the frozen tensors that this client holds to the received ones, and check them all.

        Returns:
            Every tensor of the layout: the trained ones of the order's ranks, and the whole frozen ones.

        Raises:
            Refused: "missing-tensors": the server believes that this client holds frozen tensors which it does not
                hold. "invalid-tensors": names, shapes, values or the digest of the frozen tensors are wrong.
        """
        names = {spec.name for spec in layout.frozen}
        received = {name: array for name, array in tensors.items() if name in names}
        held_sha256, held = self.state.frozen()
        frozen = {name: array for name, array in {**held, **received}.items() if name in names}
        if frozen.keys() != names:
            raise Refused("missing-tensors")
        try:
            layout.sent_in(dict(plan.prefixes)).check(
                {**tensors, **frozen}, "state", most=MOST_RECEIVED if self.run.private else MOST_VALUE)
        except ValueError as error:
            raise Refused("invalid-tensors", str(error)) from error
        if (tensors_digest(frozen) if received or not names else held_sha256) != plan.frozen_sha256:
            if received.keys() != names:  # the client holds other tensors than the server believes
                raise Refused("missing-tensors")
            raise Refused("invalid-tensors", "the frozen tensors do not have the digest that the order names")
        if received:
            self.state.save_frozen(plan.frozen_sha256, frozen)
        return {**tensors, **frozen}


def _keeps(known: Noise | None, fresh: Noise | None) -> bool:
    """Return whether the noise of a run that has begun is still enough, and charged as the policy says."""
    if known is None or fresh is None:
        return known is fresh
    return (known.aggregate is None) == (fresh.aggregate is None) and known.charged >= fresh.charged


def _check_time(plan: RoundPlan) -> None:
    """Check that the order's time is not up. A round that is refused here is not begun and costs nothing.

    Raises:
        Refused: "too-late": nobody waits for this round any more.
    """
    if plan.is_late:
        log.warning("Round %d, attempt %d is not begun, and nothing is charged: its time was up before this client was "
                    "ready.", plan.round, plan.attempt)
        raise Refused("too-late", "the client could not begin in time")


def _in_round(layout: AdapterLayout, plan: RoundPlan) -> AdapterLayout:
    """Return the layout in which only what this round trains counts as trained.

    Raises:
        Refused: "invalid-tensors": the order names a tensor that does not train in this run, or a rank that the plan
            does not have.
    """
    if unknown := set(plan.active) - {spec.name for spec in layout.trained}:
        raise Refused("invalid-tensors", f"the order trains {len(unknown)} tensors that do not train in this run")
    try:
        return layout.in_round(plan)
    except ValueError as error:
        raise Refused("invalid-tensors", f"the order's ranks do not fit the adapter: {error}") from None
