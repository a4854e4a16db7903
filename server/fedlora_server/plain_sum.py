"""One round with secure aggregation over an engine whose clients mask nothing: the same integers, added up as they are.

This is for simulations, in which one process holds all clients. There is nothing to hide, so there are no packages,
signatures or shares; the opened sum has the bits of the masked one.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event
from typing import cast

import numpy as np
from flwr.app import ArrayRecord

from fedlora.secure_sum.packages import SUM
from fedlora_strategies import FederatedLoRA
from fedlora_strategies.messages import to_arrays

from .client_sampling import Clients
from .engine import Engine
from .observer import Observer
from .round_state import OpenRound, RoundOptions
from .sum_round import Opened


class PlainSum:
    """One round, from its first order to its sum. It has the outside of `fedlora_server.sum_round.SumRound`.

    Args:
        engine: reaches the clients, and names their roster.
        strategy: makes the messages.
        clients: which clients may be asked.
        number: the round's number.
        options: how rounds are run.
        observer: told what happens.
        stop: ends the round when it is set.

    Attributes:
        seconds: empty: the round has no phases.
        unopened: 0: every sum is opened.
        disclosed: name → the numbers that came with its upload.
    """

    def __init__(self, engine: Engine, strategy: FederatedLoRA, clients: Clients, number: int, options: RoundOptions,
                 observer: Observer, stop: Event) -> None:
        assert engine.roster is not None, "an engine whose clients mask nothing names their roster"
        self._engine, self._strategy, self._roster = engine, strategy, engine.roster
        self._round = OpenRound(engine, strategy, clients, number, options, observer, stop)
        self.seconds: Mapping[str, float] = {}
        self.unopened = 0
        self.disclosed: dict[str, Mapping[str, int | float]] = {}

    @property
    def attempts(self) -> int:
        """How many times clients were asked in this round."""
        return self._round.attempts

    @property
    def cohort(self) -> tuple[str, ...]:
        """Names of all clients asked."""
        return self._round.cohort

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the clients that are gone."""
        return self._round.lost

    @property
    def refused(self) -> dict[str, str]:
        """The refusal code of each client that declined, by name."""
        return self._round.refused

    def collect(self, arrays: ArrayRecord) -> Opened:
        """Ask the clients, and add up what they upload.

        Args:
            arrays: the state to train from.

        Raises:
            Ended: the run was stopped, or fewer clients uploaded than the options ask for.
        """
        replies, total = self._round.collect(arrays), np.zeros(1, self._roster.grid.dtype)
        try:
            for reply in replies:
                node = reply.metadata.src_node_id
                total = total + to_arrays(cast(ArrayRecord, reply.content["arrays"]))[SUM]
                self.disclosed[self._engine.name_of(node)] = cast(dict[str, int | float],
                                                                  dict(reply.content["metrics"]))
                self._strategy.holds_frozen(node)
        finally:
            replies.discard()
        return Opened(self._roster.grid.signed(total), self._round.uploaded, self._roster)
