"""Where the leaves of an adapter write each record's gradient: one row a record, all trained tensors side by side.

Armed, the buffer takes what the leaves write in the backward pass (`fedlora.adapters.leaves`); unarmed, they behave as
ordinary modules. Several clients may share a pass: the buffer then routes each record to its own client's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_PIECE = 256
"""So many squares are summed in float32."""

_LARGE = 1e19
"""A row this long counts as not finite: its clip factor would be a float32 of few digits, or 0."""

_SMALL = 1e-9
"""A row this long or longer loses less than a millionth of its norm with its values below 1e-19, if they are fewer
than a hundred million."""


@dataclass(frozen=True)
class Slot:
    """Where one trained tensor's values lie in a record's row."""

    parameter: nn.Parameter
    group: str
    start: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.parameter.numel())


class GradientBuffer:
    """[records, values] float32: one row for each record of a micro-batch.

    Its memory is kept between micro-batches and grows to the largest.

    Attributes:
        slots: in the order of columns; tensors of one group are neighbours.
    """

    def __init__(self, trained: Sequence[tuple[nn.Parameter, str]]) -> None:
        slots, start = [], 0
        for group in sorted({group for _, group in trained}):
            for parameter in (p for p, g in trained if g == group):
                slots.append(Slot(parameter, group, start))
                start += parameter.numel()
        self.slots = tuple(slots)
        self.values = start
        self._storage = torch.empty(0, start)
        self._rows: torch.Tensor | None = None
        self._records = 0
        self._written: set[int] = set()
        self._slot_of = {id(slot.parameter): slot for slot in slots}
        self._stacks: Mapping[int, torch.Tensor] = {}
        self._owners: torch.Tensor | None = None

    @property
    def armed(self) -> bool:
        return self._rows is not None

    @property
    def rows(self) -> torch.Tensor:
        """The records' gradients: [records, values]. Overwritten by the next micro-batch."""
        return self.computed[:self._records]

    @property
    def computed(self) -> torch.Tensor:
        """[at least records, values]: those of the rows that only fill a micro-batch up stand after the records'."""
        assert self._rows is not None, "the buffer is not armed"
        return self._rows

    @property
    def written(self) -> frozenset[int]:
        """Ids of the parameters whose gradients the armed buffer has."""
        return frozenset(self._written)

    def arm(self, records: int) -> None:
        """Expect the gradients of this many records."""
        device = self.slots[0].parameter.device
        if len(self._storage) < records or self._storage.device != device:
            self._storage = torch.empty(records, self.values, device=device)
        self.show(self._storage[:records], frozenset())

    def show(self, rows: torch.Tensor, written: frozenset[int]) -> None:
        """Be armed with rows that have these parameters' gradients already."""
        self._rows, self._records, self._written = rows, len(rows), set(written)

    def keep(self, records: int) -> None:
        """After the backward pass: the rows beyond these belong to no record."""
        self._records = records

    def disarm(self) -> None:
        self._rows = None

    def check_complete(self) -> None:
        """A tensor that the backward pass did not reach would never train, and noise would hide it."""
        if len(self._written) != len(self.slots):
            raise RuntimeError(f"no gradient reached {len(self.slots) - len(self._written)} of {len(self.slots)} "
                               "trained tensors: they are not part of the model that computes the loss. Nothing was "
                               "released; please report this with the model's type and the targets")

    def route(self, stacks: Mapping[int, torch.Tensor], owners: torch.Tensor | None) -> None:
        """From now on, have each record meet its own client's tensors.

        Args:
            stacks: id of a parameter → what stands for it, [clients, *its shape]; {} for the parameters themselves.
            owners: [records] whose each record is.
        """
        self._stacks, self._owners = stacks, owners

    @property
    def size(self) -> int:
        """How many rows the pass has, fillers included."""
        return len(self.computed)

    def routed(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """[records, *shape], or None where the parameters stand for themselves. One that all clients share, as it does
        not train, is repeated.
        """
        if not self._stacks:
            return None
        stack = self._stacks.get(id(parameter))
        return parameter.detach().expand(self.size, *parameter.shape) if stack is None else stack[self._owners]

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Store the parameter's gradients, [records, ...], in the rows.

        Those of a leaf that is applied more than once in a pass are added up.
        """
        slot = self._slot_of[id(parameter)]
        # not computed into the rows: a product into memory that is not contiguous is taken record by record on a CPU
        target, values = self.computed[:, slot.columns], values.flatten(1)
        if id(parameter) in self._written:
            target += values
        else:
            target.copy_(values)
            self._written.add(id(parameter))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """L2 norm of each row of [rows, values] float32, right to 1e-6 of itself, in float64.

    A long sum of float32 squares comes out too small: those here are of `_PIECE` values. Squares of values below 1e-19
    vanish: a row that could consist of them is taken in float64. Not finite where a value is not, or is above 1e19.
    """
    if rows.device.type == "cuda":  # memory, not arithmetic, takes the time there, and the host need not wait
        exact = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return exact.where(exact < _LARGE, torch.inf)
    whole = rows.shape[1] // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, _PIECE)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    parts = torch.cat([pieces, rest], dim=1)
    norms = torch.linalg.vector_norm(_wide(parts), dim=1)
    small = norms < _SMALL
    if bool(small.any()):
        norms[small] = torch.linalg.vector_norm(_wide(rows[small.to(rows.device)]), dim=1)
    return norms


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float64; on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
