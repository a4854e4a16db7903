"""The state of one round at its strategy: what was sent, what came back, and what a second combination needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_VALUE
from fedlora.plan import Tensors, Upload

from .screening import Measured


@dataclass
class UnderWay:
    """The round under way: what was sent, and which nodes may still reply.

    Attributes:
        number: The round's number, from 1; 0 for a private start.
        trained: The trained tensors, as the server holds them.
        sent: The trained tensors as clients get them: of the round's ranks, and rounded in a bf16 run.
        frozen: The frozen tensors as clients get them.
        active: The layout of the tensors that train in this round, which are those uploaded.
        frozen_sha256: The digest of `frozen`.
        arrays: Every tensor as it is sent, serialised.
        changed: The names of the frozen tensors that are not those of the last round.
        before_sha256: The digest of the last round's frozen tensors.
        awaited: The ids of the nodes that may still reply.
        named: The names of the tensors that train, if the schedule chose some; () for all.
        prefixes: Module → rank, for the modules of which only the first ranks take part in the round.
        longer: How much longer uploads would usually be if all ranks took part: the root of the ratio of their sizes.
        ranks: Node id → how many ranks it trains, for the nodes that train fewer than the adapter has.
        narrower: Number of ranks → the same round as those nodes have it.
    """

    number: int
    trained: Tensors
    sent: Tensors
    frozen: Tensors
    active: AdapterLayout
    frozen_sha256: str
    arrays: ArrayRecord
    changed: frozenset[str]
    before_sha256: str
    awaited: set[int]
    named: tuple[str, ...] = ()
    prefixes: Mapping[str, int] = field(default_factory=dict)
    longer: float = 1.0
    ranks: dict[int, int] = field(default_factory=dict)
    narrower: dict[int, UnderWay] = field(default_factory=dict)
    _records: dict[frozenset[str], ArrayRecord] = field(default_factory=dict)

    def share_of(self, node_id: int) -> UnderWay:
        """Return the round as a node has it."""
        return self.narrower[self.ranks[node_id]] if node_id in self.ranks else self

    def arrays_for(self, held_sha256: str | None) -> ArrayRecord:
        """Return the tensors to send to a node: the trained ones, and the frozen ones that it lacks.

        Nodes that lack the same tensors share one record.

        Args:
            held_sha256: The digest of the frozen tensors that the node holds. With this round's digest, it lacks none;
                with that of the last round, those that changed; with another or None, all of them.
        """
        lacking = {self.frozen_sha256: frozenset(), self.before_sha256: self.changed}.get(
            held_sha256 or "", frozenset(self.frozen))
        if lacking not in self._records:
            names = (*self.trained, *sorted(lacking))
            self._records[lacking] = ArrayRecord({name: self.arrays[name] for name in names})
        return self._records[lacking]


@dataclass(frozen=True)
class Closed:
    """A round whose uploads were combined, with what is needed to combine them once more.

    Attributes:
        under_way: The round.
        memory: The server step's memory before the round.
        usual_norms: The usual norms of the rounds before.
        k: The limit of the screening that was used.
    """

    under_way: UnderWay
    memory: Tensors
    usual_norms: tuple[float, ...]
    k: float


class Figures:
    """The figures of a round, over its accepted uploads.

    Attributes:
        steps: The sum of the local steps.
        losses: The training losses, as far as they were disclosed.
        measured: Node id → what screening knows of its upload.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[float] = []
        self.measured: dict[int, Measured] = {}

    @property
    def replies(self) -> int:
        """The number of accepted uploads."""
        return len(self.measured)

    def add(self, upload: Upload, node: int, measured: Measured) -> None:
        """Add an accepted upload."""
        self.measured[node] = measured
        self.steps += upload.steps
        if upload.train_loss is not None and abs(upload.train_loss) < MOST_VALUE:
            self.losses.append(upload.train_loss)

    def to_dict(self) -> dict[str, int | float]:
        """Return the figures for the round's metrics."""
        loss = {"train_loss": math.fsum(self.losses) / len(self.losses)} if self.losses else {}
        return {"replies": self.replies, "steps": self.steps} | loss


def distance(new: Tensors, old: Tensors) -> float:
    """Return the L2 norm of new − old over all tensors of `new`; tensors that `old` lacks count as zero."""
    squares = (float(np.sum((new[name].astype(np.float64) - old.get(name, 0.0)) ** 2)) for name in sorted(new))
    return math.sqrt(math.fsum(squares))
