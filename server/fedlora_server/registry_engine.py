"""What the gRPC and the SuperLink engine share: registered clients, checked orders, and stored replies."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import Message

from fedlora import wire
from fedlora.adapters import AdapterLayout
from fedlora.plan import Proposal, Refusal, Released, RoundPlan, Tensors, Upload
from fedlora.wire import Shapes
from fedlora_strategies.messages import assign_id, read_train_messages, reply

from .client_registry import ClientRegistry, Event
from .engine import Engine, Outcome
from .names import Names
from .patience import HeldUp
from .seats import Member, PendingRequest

log = logging.getLogger(__name__)


class RegistryEngine(Engine):
    """An engine whose clients join by name and take a seat in a `ClientRegistry`. It serves from the moment it is made.

    Args:
        proposal: told to every client that joins.
        uploads: folder for uploads that wait to be aggregated.
        notify: called with each `Event`, from any thread; it must be quick.
        under_way: the round that an earlier server of this run had begun, if any (see `ClientRegistry`).
        names: whose each name is (see `ClientRegistry`).
    """

    address: str
    """Where clients find it, for the operator."""

    def __init__(self, proposal: Proposal, uploads: Path, notify: Callable[[Event], None], *,
                 under_way: int | None = None, names: Names | None = None) -> None:
        self._uploads, self._held_up = uploads, HeldUp()
        self._registry = ClientRegistry(proposal, notify, under_way=under_way, names=names)
        self._dtype = wire.ARRAY_DTYPES[proposal.plan.wire_dtype]
        self._trained: Shapes | None = None
        self._frozen: Shapes = {}
        self._answered: dict[str, PendingRequest] = {}  # whose replies were given, and can be again

    def expect(self, layout: AdapterLayout) -> None:
        """Fix which tensors travel: before the first message, once the label set is known."""
        self._trained = {spec.name: tuple(spec.shape) for spec in layout.trained}
        self._frozen = {spec.name: tuple(spec.shape) for spec in layout.frozen}

    def fix_labels(self, labels: tuple[str, ...]) -> None:
        """The label set is settled: whoever joins from now on is told it, and discloses no label names."""
        self._registry.fix_labels(labels)

    def keep_names(self) -> None:
        """The run has begun. An engine whose clients prove their names may keep them in its folder from now on."""

    def members(self) -> list[Member]:
        """The clients in the order in which they became ready, with what each disclosed (`ClientRegistry.members`)."""
        return self._registry.members()

    @property
    def held_up(self) -> str:
        return self._held_up.reason

    @property
    def bytes_up(self) -> int:
        return self._registry.moved()[0]

    @property
    def bytes_down(self) -> int:
        return self._registry.moved()[1]

    def name_of(self, node_id: int) -> str:
        return self._registry.name_of(node_id)

    def get_node_ids(self) -> list[int]:
        """Node ids of the clients that are connected and ready, sorted by name."""
        return self._registry.nodes(idle=False)

    def idle(self) -> list[int]:
        return self._registry.nodes(idle=True)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        orders = [self._order(*order) for order in read_train_messages(messages)]
        self._registry.push(orders)
        return [order.message_id for order in orders]

    def _order(self, message: Message, plan: RoundPlan, tensors: Tensors) -> PendingRequest:
        if self._trained is None:
            raise ValueError("the engine does not know the layout yet; call expect(layout) before the first message")
        run = self._registry.proposal.plan
        if (plan.run.run_id, plan.run.wire_dtype) != (run.run_id, run.wire_dtype):
            raise ValueError(f"the message is of run {plan.run.run_id} in {plan.run.wire_dtype}; this engine serves "
                             f"{run.run_id} in {run.wire_dtype}")
        self._registry.name_of(message.metadata.dst_node_id)
        known = {**self._trained, **self._frozen}
        for name in {*tensors, *self._trained}:
            if name not in tensors or name not in known or tensors[name].shape != known[name]:
                shape = tensors[name].shape if name in tensors else "missing"
                raise ValueError(f"tensor {name} of the message is {shape}; the layout has {known.get(name, 'none')}")
            if tensors[name].dtype != self._dtype:
                raise ValueError(f"tensor {name} of the message is {tensors[name].dtype}; in this run "
                                 f"({run.wire_dtype}) only {self._dtype.name} travels")
        message_id = message.metadata.message_id or uuid.uuid4().hex
        assign_id(message, message_id)
        return PendingRequest(message_id, message, message.metadata.dst_node_id, plan, tensors)

    def wait(self, message_ids: Iterable[str], timeout_s: float) -> dict[str, Outcome]:
        return self._registry.wait(list(message_ids), timeout_s)

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

    def cancel(self, message_ids: Iterable[str]) -> None:
        message_ids = list(message_ids)
        answered = [order for message_id in message_ids if (order := self._answered.pop(message_id, None))]
        for order in (*answered, *self._registry.cancel(message_ids)):
            if order.stored is not None:
                order.stored.discard()

    def _clear_uploads(self) -> None:
        with contextlib.suppress(OSError):  # it is the caller's folder and may hold more; the disk may fail
            for left in self._uploads.glob("*.upload"):
                left.unlink()
            self._uploads.rmdir()


def _go_on_reading(fault: OSError) -> None:
    """Of `HeldUp`: what is stored is read as soon as a file can be opened again."""
    log.warning("Stored uploads cannot be read for now: %s", fault, extra={"peer": "", "kind": "not read"})
