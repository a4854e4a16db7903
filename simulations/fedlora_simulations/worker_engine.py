"""An engine whose clients train in several workers at once, and which ends where the one-process engine ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from flwr.app import RecordDict

from fedlora.adapters import AdapterLayout
from fedlora.plan import RoundPlan
from fedlora.training import Training
from fedlora_client.session import ClientSession
from fedlora_server.engine import Outcome
from fedlora_strategies.messages import read_train_message, to_tensors

from .in_process import InProcessEngine
from .worker import Workers


class WorkerEngine(InProcessEngine):
    """Keeps the workers busy with what has been pushed, in that order.

    `wait` tells one outcome at a time and in the order asked, whichever worker is first, so that the round loop decides
    as it would over the one-process engine: with the same threads, the same bits.

    Args:
        sessions, run_id, layout: as of `InProcessEngine`.
        workers: ended by `close`.
    """

    def __init__(self, sessions: Mapping[str, ClientSession], run_id: str, layout: AdapterLayout,
                 workers: Workers) -> None:
        super().__init__(sessions, run_id, layout)
        self._workers = workers
        self._begun: dict[str, tuple[ClientSession, RoundPlan]] = {}
        self._outcomes: dict[str, Outcome] = {}

    def _train(self, message_id: str) -> None:
        while True:
            self._employ()
            if message_id in self._outcomes:
                self._orders[message_id].outcome = self._outcomes.pop(message_id)
                return
            self._collect()

    def _employ(self) -> None:
        """Begin what has not begun, as long as there is a worker for it."""
        for message_id, order in self._orders.items():
            if not self._workers.free:
                return
            if order.outcome is not None or message_id in self._begun or message_id in self._outcomes:
                continue
            plan, arrays = read_train_message(order.message)
            order.message.content = RecordDict()
            session = cast(ClientSession, self._sessions[order.message.metadata.dst_node_id])
            answer = session.begin(plan, to_tensors(arrays))
            if isinstance(answer, Training):
                self._begun[message_id] = session, plan
                self._workers.start(message_id, [answer])
            else:
                self._outcomes[message_id] = self._accept(message_id, answer)

    def _collect(self) -> None:
        """Wait for a worker, and take what it gives; the outcome is told when it is its turn."""
        message_id, [result] = self._workers.done()
        session, plan = self._begun.pop(message_id)
        answer = session.finish(plan, result)
        if message_id in self._orders:  # else it was cancelled meanwhile
            self._outcomes[message_id] = self._accept(message_id, answer)

    def cancel(self, message_ids: Iterable[str]) -> None:
        message_ids = list(message_ids)
        for message_id in message_ids:
            self._outcomes.pop(message_id, None)
        super().cancel(message_ids)

    def close(self, reason: str) -> None:
        self._workers.close()
        super().close(reason)
