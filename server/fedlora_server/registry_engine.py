"""The base of the gRPC and the SuperLink engine: registered clients, checked orders, and stored replies."""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Message
from typing_extensions import override

from fedlora import wire
from fedlora.adapters import AdapterLayout
from fedlora.plan import Proposal, Refusal, Released, RoundPlan, Tensors, Upload
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.wire import pb
from fedlora_strategies.messages import assign_id, read_train_messages, reply

from .client_registry import ClientRegistry
from .engine import Engine, Outcome
from .names import Names
from .observer import ClientEvent
from .patience import HeldUp
from .seats import Member, PendingRequest, Question

log = logging.getLogger(__name__)


class RegistryEngine(Engine):
    """An engine whose clients join by name and take a seat in a `ClientRegistry`. It serves from when it is made.

    Args:
        proposal: what every client that joins is told.
        uploads: folder for uploads that wait to be aggregated.
        notify: called with each `ClientEvent`, from any thread; it must return quickly.
        under_way: the round that an earlier server of this run had begun, if any (see `ClientRegistry`).
        names: who owns each name (see `ClientRegistry`).
    """

    address: str
    """The address under which clients find it, for the coordinator to read."""

    def __init__(self, proposal: Proposal, uploads: Path, notify: Callable[[ClientEvent], None], *,
                 under_way: int | None = None, names: Names | None = None) -> None:
        self._uploads, self._held_up = uploads, HeldUp()
        self._registry = ClientRegistry(proposal, notify, under_way=under_way, names=names)
        self._dtype = wire.ARRAY_DTYPES[proposal.plan.wire_dtype]
        self._layout: AdapterLayout | None = None
        self._answered: dict[str, PendingRequest] = {}  # their replies were pulled, and can be again

    @override
    def expect(self, layout: AdapterLayout) -> None:
        """Fix the tensors of messages. Call it before the first message, once the label set is known."""
        self._layout = layout

    def fix_labels(self, labels: tuple[str, ...]) -> None:
        """Tell this label set to the clients that join from now on, and ask them for no label names."""
        self._registry.fix_labels(labels)

    def keep_names(self) -> None:
        """Begin to record who owns each name in the run's folder, which exists now. Does nothing by default."""

    def members(self) -> list[Member]:
        """Return the clients in the order in which they became ready, each with what it disclosed."""
        return self._registry.members()

    @property
    @override
    def held_up(self) -> str:
        return self._held_up.reason

    @property
    @override
    def bytes_up(self) -> int:
        return self._registry.moved()[0]

    @property
    @override
    def bytes_down(self) -> int:
        return self._registry.moved()[1]

    @override
    def name_of(self, node_id: int) -> str:
        return self._registry.name_of(node_id)

    @override
    def get_node_ids(self) -> list[int]:
        """Return the node ids of the clients that are connected and ready, sorted by name."""
        return self._registry.nodes(idle=False)

    @override
    def idle(self) -> list[int]:
        return self._registry.nodes(idle=True)

    @override
    def memberships(self) -> Mapping[int, tuple[Entry, float]]:
        return self._registry.memberships()

    @override
    def confer(self, requests: Mapping[int, pb.SumRequest], timeout_s: float, stop: threading.Event, *,
               least: int = 0, return_s: float = 0.0, roster: Roster | None = None) -> Mapping[int, pb.SumAnswer]:
        return self._registry.confer({node: Question(request, roster) for node, request in requests.items()}, timeout_s,
                                     stop, least=least, return_s=return_s)

    @override
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return self._push([self._order(*order) for order in read_train_messages(messages)])

    @override
    def push_cohort(self, messages: Iterable[Message], cohorts: Mapping[int, pb.Cohort], ring: str) -> list[str]:
        orders = [self._order(*order) for order in read_train_messages(messages)]
        return self._push([replace(order, cohort=cohorts[order.node_id], answers_in=ring) for order in orders])

    def _push(self, orders: Sequence[PendingRequest]) -> list[str]:
        self._registry.push(orders)
        return [order.message_id for order in orders]

    def _order(self, message: Message, plan: RoundPlan, tensors: Tensors) -> PendingRequest:
        if self._layout is None:
            raise ValueError("the engine does not know the layout yet; call expect(layout) before the first message")
        run = self._registry.proposal.plan
        if (plan.run.run_id, plan.run.wire_dtype) != (run.run_id, run.wire_dtype):
            raise ValueError(f"the message belongs to run {plan.run.run_id} in {plan.run.wire_dtype}; this engine "
                             f"serves {run.run_id} in {run.wire_dtype}")
        self._registry.name_of(message.metadata.dst_node_id)
        layout = self._layout.sent_in(dict(plan.prefixes))
        known = {spec.name: spec.shape for spec in layout.state}
        for name in {*tensors, *(spec.name for spec in layout.trained)}:
            if name not in tensors or name not in known or tensors[name].shape != known[name]:
                shape = tensors[name].shape if name in tensors else "missing"
                raise ValueError(f"tensor {name} of the message is {shape}; the layout has {known.get(name, 'none')}")
            if tensors[name].dtype != self._dtype:
                raise ValueError(f"tensor {name} of the message is {tensors[name].dtype}; in this run "
                                 f"({run.wire_dtype}) only {self._dtype.name} travels")
        message_id = message.metadata.message_id or uuid.uuid4().hex
        assign_id(message, message_id)
        return PendingRequest(message_id, message, message.metadata.dst_node_id, plan, tensors,
                              answers_in=run.wire_dtype)

    @override
    def wait(self, message_ids: Iterable[str], timeout_s: float) -> dict[str, Outcome]:
        return self._registry.wait(list(message_ids), timeout_s)

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            order = self._answered.get(message_id) or self._registry.take(message_id)
            if order is None:
                continue
            self._answered[message_id] = order
            if isinstance(order.outcome, Refusal):
                yield reply(order.outcome, order.message)
            elif order.stored is not None:
                upload = Upload(*order.plan.key, tensors=Released({}), **order.stored.metrics)  # type: ignore[arg-type]
                yield reply(upload, order.message, arrays=self._held_up.patience(_go_on_reading)(order.stored.read))

    @override
    def cancel(self, message_ids: Iterable[str]) -> None:
        message_ids = list(message_ids)
        answered = [order for message_id in message_ids if (order := self._answered.pop(message_id, None))]
        for order in (*answered, *self._registry.cancel(message_ids)):
            if order.stored is not None:
                order.stored.discard()

    def _clear_uploads(self) -> None:
        with contextlib.suppress(OSError):  # the folder is the caller's and may hold other files; the disk may fail
            for left in self._uploads.glob("*.upload"):
                left.unlink()
            self._uploads.rmdir()


def _go_on_reading(fault: OSError) -> None:
    """Log the fault and wait on: stored uploads are read as soon as a file can be opened again."""
    log.warning("Stored uploads cannot be read for now: %s", fault, extra={"peer": "", "kind": "not read"})
