"""The client's core: one order to train in, one upload or one refusal out. It knows neither Flower nor sockets.

Order of events in a round, each on the disk before the next: the charge, the training, the finished (noised) upload.
A process that dies in between has been charged; one that dies after it sends the same bytes again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from fedlora.plan import Refusal, Refused, RoundPlan, RunPlan, Tensors, Upload, to_scalars
from fedlora.privacy import Budget, RunStreams
from fedlora.tasks import Records
from fedlora.training import Trainer, TrainResult
from fedlora.wire import digest

from .state import Account, State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What the data holder allows, whatever a server proposes.

    Attributes:
        epsilon: most that one run may spend; infinite turns privacy off.
        delta: None for min(1e-5, 0.1 / n̂).
        declared_size: the public n̂; None for the number of records, rounded down to two significant digits.
        max_clip_norm: the plan's clip norm is lowered to at most this.
    """

    epsilon: float
    delta: float | None = None
    declared_size: int | None = None
    max_clip_norm: float = float("inf")

    @property
    def private(self) -> bool:
        return self.epsilon != float("inf")

    def check(self, run_is_private: bool) -> None:
        """Refuse a plan whose privacy contradicts --epsilon."""
        if self.private != run_is_private:
            servers = "required" if run_is_private else "off"
            raise Refused("privacy-mismatch", f"the server runs with --privacy {servers} and this client with "
                                              f"--epsilon {self.epsilon:g}; change one of the two flags")


class ClientSession:
    """One client's part in one run.

    Args:
        run: the plan of the run; a round that carries another is refused.
        trainer: the process's trainer, shared by all simulated clients.
        records: this client's encoded training records.
        limits: what this client allows.
        state: where the account and the last upload are kept.
        streams: where this client draws its random numbers from, under its name.
    Raises:
        Refused: "privacy-mismatch", or "policy" where the plan cannot be followed within the limits (the reason is in
            the local log).
    """

    def __init__(self, run: RunPlan, trainer: Trainer, records: Records, limits: Limits, state: State,
                 streams: RunStreams) -> None:
        limits.check(run.private)
        if not len(records):
            raise ValueError("no row can be trained on: each lacks a label, or an answer within --max-length")
        self.run, self.trainer, self.records = run, trainer, records
        self.limits, self.state, self.streams = limits, state, streams
        self.last_result: TrainResult | None = None
        plan_sha256 = hashlib.sha256(json.dumps(to_scalars(run), sort_keys=True).encode()).hexdigest()
        known = state.account(run.run_id)
        if known is not None and known.plan_sha256 != plan_sha256:
            log.error("The server changed the plan of run %s while it lasts; refused.", run.run_id)
            raise Refused("policy")
        fresh = self._open_account(plan_sha256)
        if known is not None and known.terms != fresh.terms:
            log.error("Run %s was begun with %s; the limits and the data now ask for %s. They cannot change within a "
                      "run: start as before, or take part in a new run.", run.run_id, known.terms, fresh.terms)
            raise Refused("policy")
        self.account = known or fresh

    def _open_account(self, plan_sha256: str) -> Account:
        """Fix sampling rate, noise and clip norm for the run: the noise suits its most participations exactly."""
        limits, run = self.limits, self.run
        clip_norm = min(run.clip_norm, limits.max_clip_norm)
        if not run.private:
            rate = min(1.0, run.expected_batch / (limits.declared_size or len(self.records)))
            return Account(plan_sha256, rate, None, None, clip_norm)
        try:
            budget = Budget.declare(len(self.records), epsilon=limits.epsilon, delta=limits.delta,
                                    declared_size=limits.declared_size)
            noise_multiplier = budget.noise_multiplier(run.expected_batch, run.max_participations * run.local_steps)
        except ValueError as error:
            log.error("%s", error)
            raise Refused("policy") from error
        return Account(plan_sha256, budget.sampling_rate(run.expected_batch), noise_multiplier, budget.delta, clip_norm)

    def run_round(self, plan: RoundPlan, tensors: Tensors,
                  stop: Callable[[], bool] = lambda: False) -> Upload | Refusal:
        """Train once for `plan`, starting from `tensors`.

        Args:
            plan: the order; a repeated (run, round, attempt) gets the stored upload, or is refused.
            tensors: the trained tensors, and the shared ones unless this client holds them already.
            stop: asked between micro-batches; True abandons the round (which stays charged).
        Returns:
            What may be sent: the upload, or why there is none.
        """
        if plan.run != self.run:
            log.error("Round %d came with another plan than the run began with; refused.", plan.round)
            return Refusal("policy")
        stored = self.state.stored_upload(plan)
        if stored is not None:
            log.info("Round %d was trained before; the stored upload is sent again at no cost.", plan.round)
            return stored
        if (plan.round, plan.attempt) in self.account.started:
            log.warning("Round %d, attempt %d was begun before and not finished; it is not trained twice.",
                        plan.round, plan.attempt)
            return Refusal("unavailable")
        if len(self.account.started) >= self.run.max_participations:
            log.warning("This client has started %d rounds, the most that its privacy was calibrated to.",
                        len(self.account.started))
            return Refusal("budget")
        try:
            start = self._complete(plan, tensors)
        except Refused as refused:
            return refused.refusal
        self.account = self.account.charged(plan.round, plan.attempt, self.run.local_steps)
        self.state.save_account(self.run.run_id, self.account)
        return self._train(plan, start, stop)

    def _complete(self, plan: RoundPlan, tensors: Tensors) -> Tensors:
        """The received tensors, with the shared ones added from the cache, checked against the layout."""
        layout = self.trainer.adapted.layout
        shared_names = {spec.name for spec in layout.shared}
        received = {name: array for name, array in tensors.items() if name in shared_names}
        shared: Tensors = received
        if shared_names and not received:
            held = self.state.shared(plan.shared_sha256)
            if held is None:
                raise Refused("missing-tensors")
            shared = held
        try:
            layout.check({**tensors, **shared}, "state")
        except ValueError as error:
            raise Refused("invalid-tensors", str(error)) from error
        if received and digest(received) != plan.shared_sha256:
            raise Refused("invalid-tensors", "the frozen tensors do not have the digest that the order names")
        if received:
            self.state.save_shared(plan.shared_sha256, received)
        return {**tensors, **shared}

    def _train(self, plan: RoundPlan, start: Tensors, stop: Callable[[], bool]) -> Upload | Refusal:
        self.trainer.adapted.write(start)
        private = self.run.private
        result = self.trainer.train(
            self.run, self.records, sampling_rate=self.account.sampling_rate,
            noise_multiplier=self.account.noise_multiplier, clip_norm=self.account.clip_norm, lr=plan.lr,
            sampling=self.streams.stream(plan.round, "sampling", plan.attempt),
            noise=self.streams.stream(plan.round, "noise", plan.attempt) if private else None, stop=stop)
        self.last_result = result
        if result.steps < self.run.local_steps:
            log.info("Round %d was stopped before its last step; it stays charged.", plan.round)
            return Refusal("unavailable")
        upload = Upload(
            *plan.key, tensors=result.tensors, steps=result.steps, delta=self.account.delta,
            noise_multiplier=self.account.noise_multiplier,
            num_examples=None if private else len(self.records),
            train_loss=None if private else result.mean_loss)
        self.state.save_upload(upload)
        return upload
