"""An engine with all clients in this process: they share one base model and train one after the other.

The round loop, the orders and the client sessions are the same as over gRPC. Uploads wait in a file, so memory does not
grow with the number of clients. An exception in a client's code reaches the researcher unchanged.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, cast

from flwr.app import ArrayRecord, Message, RecordDict
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Refusal, Released, RoundPlan, Tensors, Upload, upload_metrics
from fedlora.secure_sum.packages import SUM
from fedlora.secure_sum.roster import Roster
from fedlora.wire import Shapes, packed, shapes_of, size_of, unpacked
from fedlora.wire.dtypes import RINGS
from fedlora.wire.npy import to_npy
from fedlora_client.flower_app import Session
from fedlora_client.session import ClientSession
from fedlora_client.sum_part import PlainPart
from fedlora_server.engine import Engine, Outcome, node_id
from fedlora_server.upload_store import BUFFER_BYTES, read_record
from fedlora_strategies.messages import assign_id, assume_identity, read_train_messages
from fedlora_strategies.messages import reply as to_reply

TURN_S = 0.05
"""Seconds for which clients may train one after the other before `wait` returns.

The caller of `wait` looks at all clients each time it returns. If it returned after every client, fast trainings would
cost a number of looks that grows with the square of the number of clients."""


@dataclass
class _PendingRequest:
    """An order to a client and its outcome. The message keeps only its metadata, which the reply needs."""

    message: Message
    plan: RoundPlan
    arrays: Tensors
    outcome: Outcome | None = None
    stored: _Stored | None = None


@dataclass(frozen=True)
class _Stored:
    """A stored upload: the place of its tensors in the store's file, and everything else it said."""

    start: int
    stop: int
    shapes: Shapes
    wire_dtype: str
    metrics: Mapping[str, int | float]


class _UploadStore:
    """Uploads that wait to be aggregated, in one unnamed file; one file for each upload took more time than all else.

    When no upload waits any more, the next one begins a new file. The operating system frees the old file when its last
    record is gone.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._waiting = 0

    def put(self, upload: Upload, wire_dtype: str) -> _Stored:
        if not self._waiting:
            self.close()
            self._file = TemporaryFile(prefix="fedlora-uploads-", buffering=BUFFER_BYTES)  # noqa: SIM115
        assert self._file is not None
        shapes, arrays, start = shapes_of(upload.tensors), packed(upload.tensors, wire_dtype), self._file.tell()
        for name in shapes:
            self._file.write(to_npy(arrays[name]))
        stop = self._file.tell()
        self._file.write(bytes(-stop % mmap.ALLOCATIONGRANULARITY))
        self._file.flush()
        self._waiting += 1
        return _Stored(start, stop, shapes, wire_dtype, upload_metrics(upload))

    def read(self, stored: _Stored) -> ArrayRecord:
        """Return the tensors as they travelled. The file is mapped into memory; it may be read any number of times."""
        assert self._file is not None
        content = mmap.mmap(self._file.fileno(), stored.stop - stored.start, access=mmap.ACCESS_READ,
                            offset=stored.start)
        return read_record(memoryview(content), stored.shapes, stored.wire_dtype)

    def discard(self) -> None:
        """Note that one of the waiting uploads will not be read any more."""
        self._waiting -= 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class InProcessEngine(Engine):
    """An engine in which a client's session runs its round when `wait` is called.

    Args:
        sessions: client name → the client's session.
        run_id: the plan's run id, 16 hexadecimal digits.
        layout: adapter layout that uploads are checked against, as over gRPC.
        roster: the roster of a run with secure aggregation, of all clients; None without. The sessions are then
            `ClientSession`.
    """

    def __init__(self, sessions: Mapping[str, Session], run_id: str, layout: AdapterLayout, *,
                 roster: Roster | None = None) -> None:
        assume_identity(run_id)
        self._layout, self.roster = layout, roster
        self._names = {node_id(name): name for name in sessions}
        self._sessions = {node_id(name): session for name, session in sessions.items()}
        self._orders: dict[str, _PendingRequest] = {}
        self._count = self._bytes_up = self._bytes_down = 0
        self._uploads = _UploadStore()

    @override
    def expect(self, layout: AdapterLayout) -> None:
        self._layout = layout

    @property
    @override
    def bytes_up(self) -> int:
        return self._bytes_up

    @property
    @override
    def bytes_down(self) -> int:
        return self._bytes_down

    @override
    def name_of(self, node_id: int) -> str:
        if node_id not in self._names:
            raise ValueError(f"no client with node id {node_id} ever joined")
        return self._names[node_id]

    def join(self, name: str, session: Session) -> None:
        """Add a client, or let one return; its unanswered orders are pending again."""
        node = node_id(name)
        self._names[node], self._sessions[node] = name, session
        for order in self._of(node):
            if order.outcome == "lost":
                order.outcome = None

    def leave(self, name: str) -> None:
        """Remove a client that drops out; its unanswered orders are lost."""
        node = node_id(name)
        self._sessions.pop(node, None)
        for order in self._of(node):
            if order.outcome is None:
                order.outcome = "lost"

    @override
    def get_node_ids(self) -> list[int]:
        return sorted(self._sessions)

    @override
    def idle(self) -> list[int]:
        busy = {order.message.metadata.dst_node_id for order in self._orders.values() if order.outcome is None}
        return sorted(self._sessions.keys() - busy, key=self._names.__getitem__)

    @override
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = []
        for message, plan, arrays in read_train_messages(messages):
            node = message.metadata.dst_node_id
            self.name_of(node)
            self._count += 1
            assign_id(message, f"{self._count}")
            message.content = RecordDict()
            self._orders[f"{self._count}"] = _PendingRequest(
                message, plan, arrays, None if node in self._sessions else "lost")
            self._bytes_down += sum(array.nbytes for array in arrays.values())
            pushed.append(f"{self._count}")
        return pushed

    @override
    def wait(self, message_ids: Iterable[str], timeout_s: float) -> Mapping[str, Outcome]:
        """Let pending clients train, and return the outcomes known so far.

        At least one pending client trains, however long it takes. Further ones follow until `TURN_S` is over or a
        client answers without an upload, because then the round may want to ask another client first, whatever the
        clock says. With no client pending, this only sleeps: no outcome can come any more.
        """
        wanted = [m for m in message_ids if m in self._orders]
        until, trained = time.monotonic() + TURN_S, False
        for message_id in wanted:
            if self._orders[message_id].outcome is None:
                self._train(message_id)
                trained = True
                if time.monotonic() >= until or self._orders[message_id].outcome != "uploaded":
                    break
        if not trained:
            time.sleep(timeout_s)
        outcomes = {m: self._orders[m].outcome for m in wanted}
        return {m: outcome for m, outcome in outcomes.items() if outcome is not None}

    @property
    def _part(self) -> PlainPart | None:
        """A client's part in a sum; None without secure aggregation."""
        roster = self.roster
        return None if roster is None else PlainPart(roster.grid, roster.values, roster.noise)

    def _train(self, message_id: str) -> None:
        order, part = self._orders[message_id], self._part
        session = self._sessions[order.message.metadata.dst_node_id]
        tensors = unpacked(order.arrays, order.plan.run.wire_dtype)
        answer = (session.run_round(order.plan, tensors) if part is None else
                  cast(ClientSession, session).run_round(order.plan, tensors, part=part))
        if order.outcome is None:  # otherwise it left meanwhile
            order.outcome = self._accept(message_id, answer)

    def _accept(self, message_id: str, answer: Upload | Refusal) -> Outcome:
        """Check an upload and store it; a refusal is returned as it is."""
        if isinstance(answer, Refusal):
            return answer
        order = self._orders[message_id]
        wire_dtype = order.plan.run.wire_dtype if self.roster is None else RINGS[self.roster.grid.dtype]
        shapes = shapes_of(answer.tensors)
        self._bytes_up += size_of(shapes, wire_dtype)
        try:
            expected = self._layout.in_round(order.plan)
            if self.roster is None:
                expected.check(answer.tensors, "trained")
            elif shapes != {SUM: (values := expected.num_trained + order.plan.run.counted,)}:
                raise ValueError(f"the vector has the shapes {shapes}; it must have {values} values")
        except ValueError as error:
            return Refusal("invalid-tensors", str(error))
        order.stored = self._uploads.put(answer, wire_dtype)
        return "uploaded"

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            order = self._orders.get(message_id)
            if order is None or order.outcome in (None, "lost"):
                continue
            if isinstance(order.outcome, Refusal):
                yield to_reply(order.outcome, order.message)
            elif order.stored is not None:
                upload = Upload(*order.plan.key, tensors=Released({}), **order.stored.metrics)  # type: ignore[arg-type]
                yield to_reply(upload, order.message, arrays=self._uploads.read(order.stored))

    @override
    def cancel(self, message_ids: Iterable[str]) -> None:
        for message_id in list(message_ids):
            order = self._orders.pop(message_id, None)
            if order is not None and order.stored is not None:
                self._uploads.discard()

    @override
    def close(self, reason: str) -> None:
        self._orders.clear()
        self._uploads.close()

    def _of(self, node: int) -> list[_PendingRequest]:
        return [order for order in self._orders.values() if order.message.metadata.dst_node_id == node]
