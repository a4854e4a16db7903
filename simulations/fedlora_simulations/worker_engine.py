"""An engine whose clients train in several workers at once, with the same results as the one-process engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Refusal, RoundPlan, Upload
from fedlora.secure_sum.roster import Roster
from fedlora.training import TrainingJob
from fedlora.wire import unpacked
from fedlora_client.session import ClientSession
from fedlora_server.engine import Outcome

from .in_process import InProcessEngine
from .worker import Workers


class WorkerEngine(InProcessEngine):
    """An engine that gives orders to free workers, in the order in which the orders were pushed.

    `wait` reports outcomes in the order in which they were asked for, whichever worker finishes first. So the round
    loop decides as it would over the one-process engine: with the same number of threads, the results have the same
    bits.

    Args:
        sessions: client name → the client's session.
        run_id: the plan's run id, 16 hexadecimal digits.
        layout: adapter layout that uploads are checked against.
        workers: the workers; `close` ends them.
        group: most clients that a worker is given at a time.
        roster: the roster of a run with secure aggregation; None without.
    """

    def __init__(self, sessions: Mapping[str, ClientSession], run_id: str, layout: AdapterLayout,
                 workers: Workers, *, group: int = 1, roster: Roster | None = None) -> None:
        super().__init__(sessions, run_id, layout, roster=roster)
        self._workers, self._group = workers, group
        self._begun: dict[str, tuple[ClientSession, RoundPlan]] = {}
        self._groups: dict[str, list[str]] = {}
        self._outcomes: dict[str, Outcome] = {}

    @override
    def _train(self, message_id: str) -> None:
        while True:
            self._employ()
            if message_id in self._outcomes:
                self._orders[message_id].outcome = self._outcomes.pop(message_id)
                return
            self._collect()

    def _employ(self) -> None:
        """Begin pending orders in turn while there are free workers."""
        waiting = (message_id for message_id, order in self._orders.items() if order.outcome is None
                   and message_id not in self._begun and message_id not in self._outcomes)
        while self._workers.free:
            trainings: dict[str, TrainingJob] = {}
            while len(trainings) < self._group and (message_id := next(waiting, None)) is not None:
                answer = self._begin(message_id)
                if isinstance(answer, TrainingJob):
                    trainings[message_id] = answer
                else:
                    self._outcomes[message_id] = self._accept(message_id, answer)
            if not trainings:
                return
            first = next(iter(trainings))
            self._groups[first] = list(trainings)
            self._workers.start(first, list(trainings.values()))

    def _begin(self, message_id: str) -> TrainingJob | Upload | Refusal:
        order = self._orders[message_id]
        session = cast(ClientSession, self._sessions[order.message.metadata.dst_node_id])
        answer = session.begin(order.plan, unpacked(order.arrays, order.plan.run.wire_dtype), part=self._part)
        if isinstance(answer, TrainingJob):
            self._begun[message_id] = session, order.plan
        return answer

    def _collect(self) -> None:
        """Wait for a worker and keep the outcomes of its trainings until `wait` asks for them."""
        key, results = self._workers.done()
        for message_id, result in zip(self._groups.pop(key), results, strict=True):
            session, plan = self._begun.pop(message_id)
            answer = session.finish(plan, result)
            if message_id in self._orders:  # otherwise it was cancelled meanwhile
                self._outcomes[message_id] = self._accept(message_id, answer)

    @override
    def cancel(self, message_ids: Iterable[str]) -> None:
        message_ids = list(message_ids)
        for message_id in message_ids:
            self._outcomes.pop(message_id, None)
        super().cancel(message_ids)

    @override
    def close(self, reason: str) -> None:
        self._workers.close()
        super().close(reason)
