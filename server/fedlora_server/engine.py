"""The interface between the round loop and the clients: a Flower `Grid` that also knows which clients are there.

Flower's `Grid` can push messages and pull replies. A federation that survives dead clients, asks backup clients and
keeps its memory flat needs a little more, and `Engine` adds just that. The round loop uses nothing else, so it runs
unchanged over gRPC (`grpc_engine.GrpcEngine`), over Flower's SuperLink (`superlink_engine.SuperLinkEngine`) and in one
process (`fedlora_simulations.in_process`).

A message is in one of four states; `wait` reports the last three:

    pending     sent and not answered
    "uploaded"  the reply has arrived, was checked, and waits in the upload store
    Refusal     the client declined, or the engine did on its behalf
    "lost"      the client is gone. If it returns before `cancel`, it is asked again with the same (run, round,
                attempt). It then sends the upload that it has, or goes on training, and the state may still change.
"""

from __future__ import annotations

import hashlib
import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from typing_extensions import override

from fedlora.adapters import AdapterLayout
from fedlora.plan import Refusal
from fedlora.secure_sum.roster import Entry, Roster
from fedlora.wire import pb

Outcome = Literal["uploaded", "lost"] | Refusal
"""The state of a message that is not pending."""


def node_id(name: str) -> int:
    """Return a client's node id, the same in every engine: the first 63 bits of its name's SHA-256. Never 0."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1 or 1


class Engine(Grid):
    """A Grid that knows clients by name, sees them come and go, and hands out replies one at a time."""

    def expect(self, layout: AdapterLayout) -> None:
        """Expect these tensors in messages from now on. An engine may leave the check to the strategy."""

    @property
    def held_up(self) -> str:
        """Why arriving uploads cannot be stored and have to wait; "" while they can be stored."""
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
        """Return the name of a client that has joined, even if it has left since.

        Raises:
            ValueError: no client with this node id has joined.
        """

    @abstractmethod
    def idle(self) -> list[int]:
        """Return the node ids of the clients that are connected, ready and have nothing to do, sorted by name."""

    masks: bool = False
    """Whether clients mask what they upload for a secure sum. If not, uploads are added up as they are."""

    roster: Roster | None = None
    """The roster of a run with secure aggregation, where clients mask nothing and the engine knows them all."""

    def memberships(self) -> Mapping[int, tuple[Entry, float]]:
        """Return what the clients that are connected and ready gave for their places in a roster, by node id.

        Each has an entry, and the noise that the client adds at least, in units of the plan's clip norm (0 if it does
        not say).
        """
        return {}

    def confer(self, requests: Mapping[int, pb.SumRequest], timeout_s: float, stop: threading.Event, *,
               least: int = 0, return_s: float = 0.0, roster: Roster | None = None) -> Mapping[int, pb.SumAnswer]:
        """Ask clients what a secure sum needs, and return their answers by node id.

        A client that returns on a new stream is asked again. The wait ends when all clients have answered or are gone,
        when the time is up, or when `stop` is set.

        Args:
            requests: node id → what the client is asked.
            timeout_s: seconds to wait at most.
            stop: ends the wait when it is set.
            least: while fewer have answered, clients that are gone are waited for too, for `return_s` seconds.
            return_s: how long they are waited for.
            roster: the roster, if that is what the requests hold. A client whose present entry it lacks is not asked.
        """
        raise NotImplementedError("this engine's clients mask nothing")

    def push_cohort(self, messages: Iterable[Message], cohorts: Mapping[int, pb.Cohort], ring: str) -> list[str]:
        """Queue the orders of one attempt at a secure sum, as `push_messages` does.

        Args:
            messages: the orders.
            cohorts: node id → the cohort, as its member is sent it.
            ring: wire dtype of the masked vectors that answer, "u32" or "u64".
        """
        raise NotImplementedError("this engine's clients mask nothing")

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages for sending and return their ids, in the same order. Does not wait.

        Each message holds one ArrayRecord (in the plan's wire dtype) and one ConfigRecord with the fields of
        `fedlora.plan.round_to_scalars`. A message to a client that is not connected becomes "lost".

        Raises:
            ValueError: a message holds anything else, or its node id is unknown.
        """

    @abstractmethod
    def wait(self, message_ids: Iterable[str], timeout_s: float) -> Mapping[str, Outcome]:
        """Wait for news since the last call, then return the state of each of these messages that is not pending.

        News is a message's new state, or a client that came, left or became idle.

        Args:
            message_ids: the messages to report on.
            timeout_s: return after so many seconds without news; 0 returns at once.
        """

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies to these messages, in order. Each is read from the upload store when its turn comes.

        An upload or a Refusal becomes a reply by `fedlora_strategies.messages.reply`. Messages in other states are
        skipped. A reply is kept, and can be pulled again, until its message is cancelled.
        """

    @abstractmethod
    def cancel(self, message_ids: Iterable[str]) -> None:
        """Forget these messages and their replies.

        Clients that work on them are told to stop. Uploads that still arrive are refused.
        """

    @abstractmethod
    def close(self, reason: str) -> None:
        """Say goodbye to all clients, with this reason, and release everything. May be called twice."""

    @override
    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @override
    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        """The run that `set_run` was given. Only Flower's own processes use it."""
        return getattr(self, "_run", None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Push messages, wait until each is answered or lost, and return the replies in the order pushed.

        Args:
            messages: as for `push_messages`.
            timeout: seconds to wait at most; None for no limit. Messages that are unanswered by then are cancelled.
        """
        pushed = self.push_messages(messages)
        deadline = None if timeout is None else time.monotonic() + timeout
        outcomes = self.wait(pushed, 0.0)
        while len(outcomes) < len(pushed) and (deadline is None or time.monotonic() < deadline):
            left = 1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic()))
            outcomes = self.wait(pushed, left)
        self.cancel(m for m in pushed if outcomes.get(m, "lost") == "lost")
        return Replies(self, [m for m in pushed if outcomes.get(m, "lost") != "lost"])


class Replies:
    """An iterable of the replies to some messages. Each iteration reads them anew, one at a time.

    The replies are discarded when nothing refers to this object any more, or by `discard`.
    """

    def __init__(self, engine: Engine, message_ids: Sequence[str]) -> None:
        self._engine, self._message_ids = engine, message_ids
        self._discarded = weakref.finalize(self, engine.cancel, message_ids)
        self._discarded.atexit = False

    def __iter__(self) -> Iterator[Message]:
        return iter(self._engine.pull_messages(self._message_ids))

    def discard(self) -> None:
        """Discard the replies now."""
        self._discarded()
