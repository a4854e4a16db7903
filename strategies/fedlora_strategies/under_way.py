"""One round as its strategy sees it: what was sent, what came, and what is needed to combine that once more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord

from fedlora.adapters import AdapterLayout
from fedlora.adapters.layout import MOST_VALUE
from fedlora.plan import Tensors, Upload

from .screening import Measured


@dataclass
class UnderWay:
    """The round that is under way: what was sent, and from which nodes a reply may still come.

    `trained` is the server's own, `sent` what clients start from; `frozen` and `arrays` are what clients are sent, and
    hold. `active` are those of `trained` that train in this round: the layout of what is uploaded.
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
    _records: dict[frozenset[str], ArrayRecord] = field(default_factory=dict)

    def arrays_for(self, held_sha256: str | None) -> ArrayRecord:
        """What a node must be sent that holds the frozen tensors of this digest: the trained, and those it lacks.

        Of the frozen ones none to a node that holds this round's, the changed ones to one that holds the last
        round's, else all. Nodes that lack the same share one record.
        """
        lacking = {self.frozen_sha256: frozenset(), self.before_sha256: self.changed}.get(
            held_sha256 or "", frozenset(self.frozen))
        if lacking not in self._records:
            names = (*self.trained, *sorted(lacking))
            self._records[lacking] = ArrayRecord({name: self.arrays[name] for name in names})
        return self._records[lacking]


@dataclass(frozen=True)
class Closed:
    """A round whose uploads have been combined, and can be once more: what it started from, and k of its screening."""

    under_way: UnderWay
    memory: Tensors
    usual_norms: tuple[float, ...]
    k: float


class Figures:
    """Sums over the accepted uploads of what they disclose."""

    def __init__(self) -> None:
        self.steps = 0
        self.losses: list[float] = []
        self.measured: dict[int, Measured] = {}

    @property
    def replies(self) -> int:
        return len(self.measured)

    def add(self, upload: Upload, node: int, measured: Measured) -> None:
        self.measured[node] = measured
        self.steps += upload.steps
        if upload.train_loss is not None and abs(upload.train_loss) < MOST_VALUE:
            self.losses.append(upload.train_loss)

    def to_dict(self) -> dict[str, int | float]:
        loss = {"train_loss": math.fsum(self.losses) / len(self.losses)} if self.losses else {}
        return {"replies": self.replies, "steps": self.steps} | loss


def distance(new: Tensors, old: Tensors) -> float:
    """L2 norm of the change of all tensors of `new` together; those that `old` lacks were zero."""
    squares = (float(np.sum((new[name].astype(np.float64) - old.get(name, 0.0)) ** 2)) for name in sorted(new))
    return math.sqrt(math.fsum(squares))
