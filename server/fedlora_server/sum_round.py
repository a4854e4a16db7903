"""One round with secure aggregation: its phases, from the key packages to the opened sum.

    packages   each member gives a key package; those who did are the cohort
    training   each of the cohort trains, and uploads a masked vector
    closing    each whose upload is in the sum signs whose uploads are
    reveals    each who signed reveals its shares
    opening    the masks are taken off the sum

In each phase as many clients as the roster's threshold must take part. If fewer do, the attempt ends unopened: its
charges stand, and another attempt begins with fresh packages. What a phase collected is stored before the next one
begins. So a server that was killed goes on in the same phase, and asks nobody to sign a second set of clients.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from fedlora.plan import Refusal
from fedlora.secure_sum.collector import Collector
from fedlora.secure_sum.packages import SUM
from fedlora.secure_sum.roster import Roster
from fedlora.secure_sum.statements import Refused
from fedlora.wire import WireError, key_to_wire, pb
from fedlora.wire.dtypes import RINGS
from fedlora.wire.sums import (
    closing_to_wire,
    cohort_to_wire,
    package_from_wire,
    reveal_from_wire,
)
from fedlora_strategies import FederatedLoRA
from fedlora_strategies.base import SumOrder
from fedlora_strategies.messages import to_arrays

from . import sum_files
from .client_sampling import POLL_S, RETURN_S, Clients, Ended
from .engine import Engine, node_id
from .observer import Observer
from .round_state import ASKS_PER_ROUND, FOR_GOOD, TRAINED_NOTHING, RoundOptions, held_up
from .sum_answers import declined
from .sum_roster import ANSWER_S, Present, Rosters

log = logging.getLogger(__name__)

PACKAGES, TRAINING, CLOSING, REVEALS, OPENING = PHASES = ("packages", "training", "closing", "reveals", "opening")
"""The phases of an attempt at a sum, in order."""


class _Unopened(Exception):
    """Raised if an attempt ends without an opened sum; the message says why."""


@dataclass(frozen=True)
class Opened:
    """The outcome of a round.

    Attributes:
        total: (values,) the sum of the survivors' vectors, int64, in units of the grid.
        survivors: names of the clients whose vectors are in it.
        roster: the roster by which it was opened.
    """

    total: np.ndarray
    survivors: tuple[str, ...]
    roster: Roster


@dataclass
class _Training:
    """The orders of one attempt that are not answered, and the attempt's deadline."""

    until: float
    open: dict[str, int] = field(default_factory=dict)  # message id → node
    told: dict[str, str] = field(default_factory=dict)  # message id → the outcome that the observer knows
    alone_since: float = math.inf  # when the last client that was at work was lost
    looked_at: float = field(default_factory=time.monotonic)
    told_held_up: bool = False


class SumRound:
    """One round from its first key package to its opened sum.

    Args:
        engine: reaches the clients.
        strategy: makes the messages.
        clients: which clients may be asked.
        rosters: who is in.
        number: the round's number.
        options: how rounds are run.
        observer: told what happens.
        stop: ends the round when it is set.

    Attributes:
        seconds: phase → seconds spent in it, over all attempts.
        unopened: number of attempts that ended without an opened sum.
        disclosed: name → the numbers that came with its upload.
    """

    def __init__(self, engine: Engine, strategy: FederatedLoRA, clients: Clients, rosters: Rosters, number: int,
                 options: RoundOptions, observer: Observer, stop: Event) -> None:
        self._engine, self._strategy, self._clients, self._rosters = engine, strategy, clients, rosters
        self._number, self._options, self._observer, self._stop = number, options, observer, stop
        self._attempts = list(clients.asked_before(number))
        self._refusals: dict[str, Refusal] = {}
        self._survivors: tuple[str, ...] = ()
        rosters.refused.clear()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.unopened = 0
        self.disclosed: dict[str, Mapping[str, int | float]] = {}

    @property
    def attempts(self) -> int:
        """How many times clients were asked to train in this round."""
        return len(self._attempts)

    @property
    def cohort(self) -> tuple[str, ...]:
        """Names of all clients asked."""
        return tuple(dict.fromkeys(name for names in self._attempts for name in names))

    @property
    def uploaded(self) -> tuple[str, ...]:
        """Names of the clients whose uploads are in the opened sum."""
        return self._survivors

    @property
    def refused(self) -> dict[str, str]:
        """The refusal code of each client that declined, by name."""
        return {name: refusal.code for name, refusal in {**self._rosters.refused, **self._refusals}.items()}

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the clients that were asked, did not decline, and are not in the sum."""
        return tuple(sorted({*self.cohort} - {*self._survivors} - self._refusals.keys()))

    def collect(self, arrays: ArrayRecord) -> Opened:
        """Take attempts until a sum is opened.

        Args:
            arrays: the state to train from.

        Raises:
            Ended: the run was stopped, too few clients were there for `wait_timeout_s`, or `ASKS_PER_ROUND` attempts
                ended unopened. Clients keep what they trained, because the run may be resumed.
        """
        order = self._strategy.sum_order(self._number, arrays)
        collector, why = self._left(order), ""
        while True:
            if collector is None:
                if self.unopened >= ASKS_PER_ROUND:
                    raise Ended("wait-timeout", f"round {self._number}: {self.unopened} attempts ended unopened; the "
                                                f"last: {why}")
                collector = self._cohort(order, why)
            try:
                total = self._attempt(collector, order, arrays)
            except _Unopened as ended:
                why = str(ended)
                self.unopened += 1
                self._observer.unopened(self._number, collector.attempt.attempt, why)
                collector = None
                continue
            self._survivors = collector.held.survivors
            return Opened(total, self._survivors, collector.roster)

    def _left(self, order: SumOrder) -> Collector | None:
        """Return what an earlier server collected for this round, to go on with it; None if there is nothing."""
        left, self._rosters.left = self._rosters.left, None
        if left is None or left.held is None or left.round != self._number or left.attempt < self.attempts - 1:
            return None
        cohort = left.held.cohort
        collector = Collector(left.roster, round=self._number, attempt=left.attempt, held=left.held,
                              values=order.values)
        if self.attempts == left.attempt:  # the earlier server was killed once it had stored the cohort
            self._note(cohort)
        deadline = time.monotonic() + min(RETURN_S, self._options.wait_timeout_s)
        while not {*map(node_id, cohort)} <= {*self._engine.get_node_ids()} and time.monotonic() < deadline:
            if self._stop.is_set():
                raise Ended("stopped")
            self._engine.wait((), POLL_S)
        return collector

    def _attempt(self, collector: Collector, order: SumOrder, arrays: ArrayRecord) -> np.ndarray:
        """Go on with an attempt whose cohort is formed, from whatever was collected for it.

        Raises:
            _Unopened: too few clients took part in a phase.
        """
        held = collector.held
        if not held.survivors:
            with self._phase(TRAINING):
                self._train(collector, order, arrays)
        if collector.closing() is None:
            with self._phase(CLOSING):
                self._agree(collector)
        if len(held.reveals) < collector.roster.threshold:
            with self._phase(REVEALS):
                self._reveal(collector)
        with self._phase(OPENING), _or_unopened():
            total = collector.opened()
        if collector.doubted is not None:
            log.warning("%r revealed false shares for the sum of round %d, which was opened without them",
                        collector.doubted, self._number, extra={"peer": collector.doubted, "kind": "sum"})
            self._refusals[collector.doubted] = Refusal("invalid-tensors", "it revealed false shares")
        assert total is not None, "as many as the threshold have revealed their shares"
        return total

    @contextlib.contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        """Tell that a phase begins, and note its seconds."""
        began = time.monotonic()
        self._observer.summing(self._number, phase)
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - began

    # Packages.

    def _cohort(self, order: SumOrder, why: str) -> Collector:
        """Ask for key packages until the threshold is reached, and form the cohort."""
        until = math.inf
        while True:
            present = self._rosters.present(self._number, why)
            with self._phase(PACKAGES):
                collector = self._packages(present, order)
            lacking = present.roster.threshold - len(collector.held.packages)
            if lacking <= 0:
                return self._formed(collector, order)
            why = (f"{len(collector.held.packages)} clients gave a key package, and a sum needs "
                   f"{present.roster.threshold}")
            until = min(until, time.monotonic() + self._options.wait_timeout_s)
            if time.monotonic() >= until:
                raise Ended("wait-timeout", f"round {self._number}: {why}")
            self._engine.wait((), POLL_S)

    def _packages(self, present: Present, order: SumOrder) -> Collector:
        """Ask for a key package each, and return the collector of those that came."""
        collector = Collector(present.roster, round=self._number, attempt=self.attempts,
                              values=order.values)
        request = pb.SumRequest(package=self._key(collector))
        answers = self._ask(dict.fromkeys(present.names, request))
        for node, answer in answers.items():
            with self._understood(present.names[node]):
                collector.add_package(package_from_wire(answer.package))
        return collector

    def _formed(self, collector: Collector, order: SumOrder) -> Collector:
        """Form the cohort, and store it and whom the round asks, before anybody is asked to train."""
        names = tuple(sorted(collector.held.packages))
        collector.form_cohort(order.sent)
        self._rosters.keep(lambda out: sum_files.keep(out, collector))
        self._note(names)
        return collector

    def _note(self, names: tuple[str, ...]) -> None:
        """Store whom the round asks."""
        self._clients.participations.update(map(node_id, names))
        self._attempts.append(names)
        self._clients.remember(self._number, self._attempts)

    # Training.

    def _train(self, collector: Collector, order: SumOrder, arrays: ArrayRecord) -> None:
        """Ask the cohort to train, add up what it uploads, and close the sum."""
        training = self._ordered(collector, order, arrays)
        try:
            while training.open and not self._is_over(collector, training):
                if self._stop.is_set():
                    raise Ended("stopped")
                self._listen(collector, training)
        except Ended:
            training.open.clear()  # clients finish their training and keep the upload: the run may be resumed
            raise
        finally:
            self._engine.cancel(list(training.open))
        self._clients.came_in_time(map(node_id, collector.held.uploaded))
        with _or_unopened():
            collector.close()
        self._rosters.keep(lambda out: sum_files.keep_total(out, collector))
        self._rosters.keep(lambda out: sum_files.keep(out, collector))

    def _ordered(self, collector: Collector, order: SumOrder, arrays: ArrayRecord) -> _Training:
        """Send the orders to train."""
        names, timeout_s = collector.held.cohort, self._options.round_timeout_s
        config = ConfigRecord({"nodes": sorted(map(node_id, names)), "attempt": collector.attempt.attempt,
                               "deadline_s": timeout_s})
        messages = self._strategy.configure_train(self._number, arrays, config, self._engine)
        requests = collector.form_cohort(order.sent)
        known = [message for message in messages if self._knows(message.metadata.dst_node_id)]
        cohorts = {node_id(name): cohort_to_wire(request) for name, request in requests.items()}
        self._observer.asked(self._number, collector.attempt.attempt, names)
        ids = self._engine.push_cohort(known, cohorts, RINGS[collector.roster.grid.dtype])
        return _Training(time.monotonic() + timeout_s, {message_id: message.metadata.dst_node_id for message_id, message
                                                        in zip(ids, known, strict=True)})

    def _knows(self, node: int) -> bool:
        """Return whether this server has seen a client, which an earlier server had asked."""
        try:
            self._engine.name_of(node)
        except ValueError:
            return False
        return True

    def _listen(self, collector: Collector, training: _Training) -> None:
        """Take the next answers."""
        outcomes = self._engine.wait(list(training.open), POLL_S)
        self._stand_still(training)
        for message_id, outcome in outcomes.items():
            name = self._engine.name_of(training.open[message_id])
            if training.told.get(message_id) != str(outcome):
                training.told[message_id] = str(outcome)
                self._observer.answered(self._number, name, str(outcome))
            if outcome == "lost":
                continue
            node = training.open.pop(message_id)
            if isinstance(outcome, Refusal):
                self._decline(node, name, outcome)
            else:
                self._add(collector, name, message_id)
            self._engine.cancel([message_id])
        at_work = any(outcomes.get(message_id) != "lost" for message_id in training.open)
        training.alone_since = math.inf if at_work else min(training.alone_since, time.monotonic())

    def _stand_still(self, training: _Training) -> None:
        """Stop the clients' clock while this machine cannot store uploads, and tell the observer."""
        before, training.looked_at = training.looked_at, time.monotonic()
        if reason := self._engine.held_up:
            training.until += training.looked_at - before
            if not training.told_held_up:
                training.told_held_up = True
                self._observer.held_up(held_up(reason))

    def _add(self, collector: Collector, name: str, message_id: str) -> None:
        """Add an upload to the sum."""
        for reply in self._engine.pull_messages([message_id]):
            with self._understood(name):
                collector.add_upload(name, to_arrays(cast(ArrayRecord, reply.content["arrays"]))[SUM])
                self.disclosed[name] = cast(dict[str, int | float], dict(reply.content["metrics"]))
                self._strategy.holds_frozen(node_id(name))
                self._refusals.pop(name, None)

    def _is_over(self, collector: Collector, training: _Training) -> bool:
        """Return whether no further upload is waited for."""
        now, uploads = time.monotonic(), len(collector.held.uploaded)
        if now >= training.until:
            nodes = list(training.open.values())
            self._clients.missed(self._number, nodes)
            self._observer.overdue(self._number, tuple(sorted(map(self._engine.name_of, nodes))),
                                   max(0, collector.roster.threshold - uploads))
            return True
        limit = self._options.wait_timeout_s
        enough = uploads >= collector.roster.threshold
        return (uploads + len(training.open) < collector.roster.threshold
                or now - training.alone_since >= (min(RETURN_S, limit) if enough else limit))

    def _decline(self, node: int, name: str, refusal: Refusal) -> None:
        self._refusals[name] = refusal
        if refusal.code in FOR_GOOD:
            self._clients.declined.add(node)
        if refusal.code in TRAINED_NOTHING:
            self._clients.participations[node] -= 1
        if refusal.code == "missing-tensors":
            self._strategy.forget(node)

    # Closing and reveals.

    def _agree(self, collector: Collector) -> None:
        """Have the survivors sign whose uploads are in the sum."""
        held = collector.held
        request = pb.SumRequest(survivors=pb.Survivors(key=self._key(collector), names=held.survivors))
        answers = self._ask({node_id(name): request for name in held.survivors if name not in held.signatures},
                            collector.roster.threshold - len(held.signatures))
        for node, answer in answers.items():
            with self._understood(name := self._engine.name_of(node)):
                collector.add_signature(name, answer.agreement.signature)
        self._rosters.keep(lambda out: sum_files.keep(out, collector))
        if collector.closing() is None:
            raise _Unopened(f"{len(held.signatures)} of {len(held.survivors)} clients signed whose uploads are in the "
                            f"sum, and {collector.roster.threshold} must")

    def _reveal(self, collector: Collector) -> None:
        """Have those who signed reveal their shares."""
        held, closing = collector.held, collector.closing()
        assert closing is not None
        request = pb.SumRequest(closing=closing_to_wire(closing, self._key(collector)))
        answers = self._ask({node_id(name): request for name in closing.signatures if name not in held.reveals},
                            collector.roster.threshold - len(held.reveals))
        for node, answer in answers.items():
            with self._understood(name := self._engine.name_of(node)):
                collector.add_reveal(reveal_from_wire(answer.reveal, name))
        self._rosters.keep(lambda out: sum_files.keep(out, collector))
        if len(held.reveals) < collector.roster.threshold:
            raise _Unopened(f"{len(held.reveals)} clients revealed their shares, and {collector.roster.threshold} must")

    # All phases.

    def _ask(self, requests: Mapping[int, pb.SumRequest], least: int = 0) -> dict[int, pb.SumAnswer]:
        """Ask clients, and return the answers of those that do not decline. Those that stay silent miss the round.

        Args:
            requests: node id → what it is asked.
            least: while fewer have answered, clients that are gone are waited for too.
        """
        answers = self._engine.confer(requests, min(ANSWER_S, self._options.round_timeout_s), self._stop, least=least,
                                      return_s=min(ANSWER_S, self._options.wait_timeout_s))
        if self._stop.is_set():
            raise Ended("stopped")
        connected = self._engine.memberships()
        self._clients.missed(self._number, [node for node in requests if node in connected and node not in answers])
        for node, answer in answers.items():
            if (why := declined(answer)) is not None:
                name = self._engine.name_of(node)
                self._observer.answered(self._number, name, str(why))
                self._refusals[name] = why
                if why.code in FOR_GOOD:
                    self._clients.declined.add(node)
        return {node: answer for node, answer in answers.items() if declined(answer) is None}

    @contextlib.contextmanager
    def _understood(self, name: str) -> Iterator[None]:
        """Leave out what a client sends that the protocol does not allow, and say so."""
        try:
            yield
        except (Refused, WireError, KeyError) as error:
            log.warning("What %r sent for the sum of round %d is left out: %s", name, self._number, error,
                        extra={"peer": name, "kind": "sum"})
            self._refusals[name] = Refusal("invalid-tensors", str(error))

    def _key(self, collector: Collector) -> pb.Key:
        return key_to_wire((self._strategy.plan.run_id, self._number, collector.attempt.attempt))


@contextlib.contextmanager
def _or_unopened() -> Iterator[None]:
    """Turn what the protocol refuses into the end of the attempt."""
    try:
        yield
    except Refused as error:
        raise _Unopened(str(error)) from None
