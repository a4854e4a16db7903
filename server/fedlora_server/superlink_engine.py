"""The SuperLink engine: its clients are Flower SuperNodes, reached through a ServerApp's Grid.

Flower numbers the nodes and carries messages. Which client a node is, and which of its answers count, is decided by the
same registry and the same checks as over gRPC. Each node that appears is asked to join, and is known by its name from
then on. So uploads are averaged in the same order, whatever numbers Flower gives.

One thread polls the SuperLink over HTTP each second for nodes and answers. Flower cannot tell a node to stop. The
answer to a cancelled order is dropped when it comes, and until then the node counts as busy.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from flwr.app import Message
from flwr.serverapp import Grid
from typing_extensions import override

from fedlora import wire
from fedlora.plan import Proposal, Refusal, Refused, Upload
from fedlora.wire import Key, pb
from fedlora_strategies.messages import is_undelivered, join_message, read_join_reply, read_reply, train_message

from .engine import Outcome
from .observer import ClientEvent
from .registry_engine import RegistryEngine
from .seats import ClientStream, PendingRequest
from .upload_store import Stored, new_upload, not_stored, store

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""Seconds between two polls of the SuperLink. SuperNodes themselves poll every 3 s."""
REPLIES_AT_ONCE = 8
"""Largest number of replies pulled at once, and so of uploads in memory."""


class _Node(ClientStream):
    """A SuperNode, as the `ClientStream` through which the registry reaches it.

    `name` is empty until the node has joined.
    """

    def __init__(self, flower_id: int, told: Proposal, outgoing: SimpleQueue[tuple[_Node, PendingRequest]]) -> None:
        self.flower_id, self.told = flower_id, told
        self.name, self.process, self.secret, self.came_from, self.fingerprint = "", b"", b"", "", ""
        self.cancelled: Key | None = None
        self._outgoing = outgoing

    @override
    def ask(self, order: PendingRequest) -> None:
        self._outgoing.put((self, order))

    @override
    def cancel(self, key: Key) -> None:
        """Drop the order if it has not been sent yet. Flower has no message that stops a node."""
        self.cancelled = key

    @override
    def consult(self, request: pb.SumRequest) -> None:
        """Do nothing: no SuperNode takes part in a run with secure aggregation."""

    @override
    def close(self, why: Refusal | None = None) -> None:
        """Do nothing: a node has no connection of its own."""


class SuperLinkEngine(RegistryEngine):
    """An engine whose clients are SuperNodes. It polls the SuperLink from when it is made until `close`.

    Args:
        grid: the ServerApp's Grid. No one else may use it meanwhile.
        proposal: what each node is told when it is asked to join. Its `run_id` is FedLoRA's, not Flower's.
        uploads: folder for uploads that wait to be aggregated; made if absent, cleared of them at the end.
        notify: called with each `ClientEvent`, from any thread; it must return quickly.
    """

    address = "Flower's SuperLink"

    def __init__(self, grid: Grid, proposal: Proposal, uploads: Path, notify: Callable[[ClientEvent], None]) -> None:
        super().__init__(proposal, uploads, notify)
        self._grid, self._notify, self._wire_dtype = grid, notify, proposal.plan.wire_dtype
        self._nodes: dict[int, _Node] = {}
        self._outgoing: SimpleQueue[tuple[_Node, PendingRequest]] = SimpleQueue()
        self._asked: dict[str, tuple[_Node, Key | None]] = {}  # Flower's message id → node and order (None: a Join)
        self._failure: Exception | None = None
        self._closed = threading.Event()
        uploads.mkdir(parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._keep_looking, name="fedlora-superlink", daemon=True)
        self._thread.start()

    @override
    def wait(self, message_ids: Iterable[str], timeout_s: float) -> dict[str, Outcome]:
        if self._failure is not None:
            raise RuntimeError("the exchange with the SuperLink failed; checkpoint.safetensors in the run's folder "
                               "holds the last finished round") from self._failure
        return super().wait(message_ids, timeout_s)

    @override
    def close(self, reason: str) -> None:
        self._closed.set()
        self._thread.join()
        self._clear_uploads()

    # The engine's thread.

    def _keep_looking(self) -> None:
        try:
            while not self._closed.is_set():
                self._meet(set(self._grid.get_node_ids()))
                self._send()
                self._collect()
                self._closed.wait(LOOK_EVERY_S)
        except Exception as error:
            self._failure = error

    def _meet(self, present: set[int]) -> None:
        """Ask new nodes to join, and give up those that are gone."""
        for flower_id in self._nodes.keys() - present:
            self._lose(self._nodes[flower_id])
        for flower_id in sorted(present - self._nodes.keys()):
            node = self._nodes[flower_id] = _Node(flower_id, self._registry.proposal, self._outgoing)
            welcome = pb.ServerFrame(welcome=wire.proposal_to_wire(node.told)).SerializeToString()
            self._post(node, None, join_message(welcome, flower_id))

    def _lose(self, node: _Node) -> None:
        del self._nodes[node.flower_id]
        self._asked = {id: asked for id, asked in self._asked.items() if asked[0] is not node}
        self._registry.gone(node)

    def _send(self) -> None:
        while True:
            try:
                node, order = self._outgoing.get_nowait()
            except Empty:
                return
            if order.plan.key == node.cancelled:
                self._registry.answered(node, order.plan.key, Refusal("too-late"))
            elif self._nodes.get(node.flower_id) is node:
                arrays = order.message.content["arrays"]
                self._registry.count(node, down=wire.size_of(wire.shapes_of(order.tensors), self._wire_dtype))
                message = train_message(order.plan, arrays, node.flower_id)  # type: ignore[arg-type]
                if order.plan.until < math.inf:  # Flower does not deliver the message after that time
                    message.metadata.ttl = max(LOOK_EVERY_S, order.plan.left_s)
                self._post(node, order.plan.key, message)

    def _post(self, node: _Node, key: Key | None, message: Message) -> None:
        [message_id] = self._grid.push_messages([message])
        self._asked[message_id] = node, key

    def _collect(self) -> None:
        waiting = list(self._asked)
        for start in range(0, len(waiting), REPLIES_AT_ONCE):
            for reply in self._grid.pull_messages(waiting[start:start + REPLIES_AT_ONCE]):
                node, key = self._asked.pop(reply.metadata.reply_to_message_id, (None, None))
                if node is None:
                    continue
                if is_undelivered(reply):
                    self._lose(node)
                elif key is None:
                    self._on_join(node, reply)
                else:
                    self._on_answer(node, key, reply)

    def _on_join(self, node: _Node, reply: Message) -> None:
        """Give the node its name's seat. A node that is turned away is asked again only when it reconnects."""
        try:
            answer = read_join_reply(reply)
            if isinstance(answer, Refusal):
                raise Refused(answer.code, wire.clean(answer.detail))
            join, ready = (partial(wire.parse, pb.ClientFrame, frame) for frame in answer)
            self._registry.join(node, join().join, node.told)
            labels = ready().ready.labels  # read only after `join` has checked the version
            self._registry.ready(node, wire.labels_from_wire(labels, announced=True), None)
        except Refused as refused:
            self._notify(ClientEvent("declined", node.name or f"SuperNode {node.flower_id}", str(refused.refusal),
                                     refused.refusal.code))
        except Exception as error:
            self._registry.gone(node)
            if not isinstance(error, ValueError):
                log.exception("The answer of SuperNode %d to the request to join could not be read", node.flower_id)
            self._notify(ClientEvent("refused", f"SuperNode {node.flower_id}", wire.clean(str(error))))

    def _on_answer(self, node: _Node, key: Key, reply: Message) -> None:
        answer: Stored | Refusal
        try:
            read = read_reply(reply, self._wire_dtype)
            answer = read if isinstance(read, Refusal) else self._store(node, key, read)
        except Refused as refused:
            answer = refused.refusal
        except ValueError as error:
            answer = Refusal("invalid-tensors", wire.clean(str(error)))
        except OSError as error:
            answer = not_stored(error)
        except Exception:  # one node's malformed reply must not end the run for all
            log.exception("The reply of client %r could not be read", node.name)
            answer = Refusal("invalid-tensors")
        if self._registry.answered(node, key, answer) is not None and isinstance(answer, Stored):
            answer.discard()

    def _store(self, node: _Node, key: Key, upload: Upload) -> Stored:
        """Check an upload as the gRPC engine does, and store it.

        Raises:
            Refused: no such order is open.
            ValueError: it does not fit the order, the layout or the run's privacy.
        """
        if (upload.run_id, upload.round, upload.attempt) != key:
            raise ValueError(f"the upload is for round {upload.round}, attempt {upload.attempt} of run "
                             f"{upload.run_id}; {key} was ordered")
        order = self._registry.expected(node, key)
        assert self._layout is not None
        shapes = wire.shapes_of(upload.tensors)  # an upload that is sent again is dropped
        (self._layout.in_round(order.plan) if order else self._layout.resent(shapes)).check(upload.tensors, "trained")
        metrics = wire.metrics_from_wire(wire.upload_to_wire(upload), private=self._registry.proposal.plan.private)
        self._registry.count(node, up=wire.size_of(shapes, self._wire_dtype))
        arrays = wire.packed(upload.tensors, self._wire_dtype)
        return store(new_upload(self._uploads), arrays, self._wire_dtype, metrics,
                     self._held_up.patience(partial(self._go_on, node, key)))

    def _go_on(self, node: _Node, key: Key, fault: OSError) -> None:
        """Return if the upload that waits for a full disk is still needed.

        The engine's thread does nothing else while it waits.

        Raises:
            OSError: the engine is closed; this is the fault itself.
            Refused: the order was cancelled.
        """
        if self._closed.is_set():
            raise fault
        self._registry.expected(node, key)
