"""What carries messages between the round loop and the clients: a Flower `Grid` that also says who is there.

Flower's `Grid` can push messages and pull replies. A federation that must survive dead clients, ask backup clients and
keep its memory flat needs a little more, and `Engine` is that little. The round loop is written against it alone, so
that it runs unchanged over gRPC (`grpc_engine.GrpcEngine`) and in one process (`fedlora_simulations.in_process`).

A message has one of four states, and `wait` tells of the last three:

    pending     asked, not answered
    "uploaded"  the reply is here, checked and waiting in the upload store
    Refusal     the client, or the engine on its behalf, declined
    "lost"      the client is gone. If it comes back before `cancel`, it is asked again with the same (run, round,
                attempt), re-sends what it has or goes on training, and the state may still become one of the others.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.adapters import AdapterLayout
from fedlora.plan import Refusal

Outcome = Literal["uploaded", "lost"] | Refusal
"""What became of a message that is no longer pending."""


def node_id(name: str) -> int:
    """A client's node id in every engine: the first 63 bits of SHA-256 of its name. Never 0."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1 or 1


class Engine(Grid):
    """A Grid that knows names, sees clients come and go, and gives replies back one at a time."""

    def expect(self, layout: AdapterLayout) -> None:
        """From the next message on, these tensors travel; an engine may leave their check to the strategy."""

    @property
    def held_up(self) -> str:
        """Why uploads that come in cannot be stored for now and wait for that; "" while they can."""
        return ""

    @property
    @abstractmethod
    def bytes_up(self) -> int:
        """Bytes received from all clients since the start, tensors and everything else."""

    @property
    @abstractmethod
    def bytes_down(self) -> int:
        """Bytes sent to all clients since the start, tensors and everything else."""

    @abstractmethod
    def name_of(self, node_id: int) -> str:
        """The name of a client that has joined, also if it has left since.

        Raises:
            ValueError: no client with this node id ever joined.
        """

    @abstractmethod
    def idle(self) -> list[int]:
        """Node ids of the clients that are connected, ready and have nothing to do, sorted by name."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages on their way and return their ids, in order, without waiting for anything.

        Each must hold exactly one ArrayRecord (of the plan's wire dtype), one ConfigRecord with the fields of
        `fedlora.plan.round_to_scalars`, and nothing else. A message to a client that is not connected becomes "lost".

        Raises:
            ValueError: a message holds anything else, or its node id is unknown.
        """

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout_s: float) -> Mapping[str, Outcome]:
        """Block until something is new since the last call, then say how all these messages stand.

        New is a changed outcome of one of them, or a client that came, left or became idle. Pending messages are
        absent from the answer. With nothing new for `timeout_s` seconds it answers all the same; 0 never blocks.
        """

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies, in the order asked, each read from the upload store only when the iterator reaches it.

        "uploaded" and a Refusal give what `fedlora_strategies.messages.reply` makes of the upload or the refusal; other
        states give nothing. A reply is kept, and given again, until its message is cancelled.
        """

    @abstractmethod
    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget these messages and what was answered: clients that work on them are told to stop and uploads that
        still come are refused.
        """

    @abstractmethod
    def close(self, reason: str) -> None:
        """Tell all clients goodbye and release everything. May be called twice."""

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given; only Flower's own processes need one."""
        return getattr(self, "_run", None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """As in Flower: push, wait for all (no reply from lost clients), pull. Replies come in the order pushed."""
        pushed = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        outcomes = self.wait(pushed, 0.0)
        while len(outcomes) < len(pushed) and (deadline is None or time.monotonic() < deadline):
            left = 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))
            outcomes = self.wait(pushed, left)
        self.cancel(m for m in pushed if outcomes.get(m, "lost") == "lost")
        return Replies(self, [m for m in pushed if outcomes.get(m, "lost") != "lost"])


class Replies:
    """The replies to some messages, read one at a time and as often as they are gone through. They are discarded once
    nobody holds this any more.
    """

    def __init__(self, engine: Engine, message_ids: Sequence[str]) -> None:
        self._engine, self._message_ids = engine, message_ids
        self._discarded = weakref.finalize(self, engine.cancel, message_ids)
        self._discarded.atexit = False

    def __iter__(self) -> Iterator[Message]:
        return iter(self._engine.pull_messages(self._message_ids))

    def discard(self) -> None:
        """Forget them now."""
        self._discarded()
