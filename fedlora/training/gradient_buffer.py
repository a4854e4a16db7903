"""The buffer of per-record gradients: one row for each record, all trained tensors side by side.

While the buffer is armed, an adapter's trained layers, its leaves, write each record's gradient to it in the backward
pass (`fedlora.adapters.leaves`). While it is not, they behave like ordinary modules. If several clients share a pass,
the buffer also tells the leaves which client's tensors belong to which record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

_PIECE = 256
"""The number of squares that are summed in float32 before the sum goes on in float64."""

_LARGE = 1e19
"""A row of this norm or more counts as not finite: its clip factor would be 0 or have few digits in float32."""

_SMALL = 1e-9
"""Rows with a smaller norm are summed in float64 throughout.

The squares of values below 1e-19 vanish in float32. A row of this norm or more loses less than a millionth of its norm
to that, if it has fewer than a hundred million values."""


@dataclass(frozen=True)
class Slot:
    """The columns of a row that hold one trained tensor's gradient.

    Attributes:
        parameter: The trained tensor.
        group: Its group, "adapter" or "head"; the groups are scaled separately.
        start: Its first column.
    """

    parameter: nn.Parameter
    group: str
    start: int

    @property
    def columns(self) -> slice:
        """The tensor's columns."""
        return slice(self.start, self.start + self.parameter.numel())


class GradientBuffer:
    """The gradients of a micro-batch's records, [records, values] float32.

    The memory is kept between micro-batches; it grows to the size of the largest one.

    Args:
        trained: The trained parameters, each with its group.

    Attributes:
        slots: The trained tensors in the order of their columns. Tensors of one group are neighbours.
        values: The number of columns, which is the number of trained values.
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
        """Whether the buffer takes gradients, or holds them."""
        return self._rows is not None

    @property
    def rows(self) -> torch.Tensor:
        """[records, values] The records' gradients, without filler rows. Overwritten by the next micro-batch."""
        return self.computed[:self._records]

    @property
    def computed(self) -> torch.Tensor:
        """[rows, values] All rows of the micro-batch: the records' gradients first, then those of filler rows."""
        assert self._rows is not None, "the buffer is not armed"
        return self._rows

    @property
    def written(self) -> frozenset[int]:
        """The ids of the parameters whose gradients are in the buffer."""
        return frozenset(self._written)

    def arm(self, records: int) -> None:
        """Prepare for the gradients of this many rows."""
        device = self.slots[0].parameter.device
        if len(self._storage) < records or self._storage.device != device:
            self._storage = torch.empty(records, self.values, device=device)
        self.show(self._storage[:records], frozenset())

    def show(self, rows: torch.Tensor, written: frozenset[int]) -> None:
        """Arm the buffer with rows that hold gradients already.

        Args:
            rows: [records, values] The rows to use.
            written: The ids of the parameters whose gradients they hold.
        """
        self._rows, self._records, self._written = rows, len(rows), set(written)

    def keep(self, records: int) -> None:
        """Keep the first `records` rows as records, after the backward pass. The rows after them are fillers."""
        self._records = records

    def disarm(self) -> None:
        """Stop taking gradients."""
        self._rows = None

    def check_complete(self) -> None:
        """Check that the backward pass reached every trained tensor.

        A tensor that it does not reach would never be trained, and the noise would hide that.

        Raises:
            RuntimeError: It missed some.
        """
        if len(self._written) != len(self.slots):
            raise RuntimeError(f"no gradient reached {len(self.slots) - len(self._written)} of {len(self.slots)} "
                               "trained tensors: they are not part of the model that computes the loss. Nothing was "
                               "released; please report this with the model's type and the targets")

    def route(self, stacks: Mapping[int, torch.Tensor], owners: torch.Tensor | None) -> None:
        """Set which client's tensors each record of the following passes is computed with.

        Args:
            stacks: Id of a parameter → the clients' tensors in its place, [clients, *shape]. {} computes every record
                with the parameters themselves.
            owners: [records] The index of each record's client. None together with {}.
        """
        self._stacks, self._owners = stacks, owners

    @property
    def size(self) -> int:
        """The number of rows of the pass, fillers included."""
        return len(self.computed)

    def routed(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the tensor that each record is computed with in place of a parameter.

        Args:
            parameter: A parameter of the model.

        Returns:
            [records, *shape], or None if every record uses the parameter itself. A parameter that all clients share,
            because it does not train, is repeated.
        """
        if not self._stacks:
            return None
        stack = self._stacks.get(id(parameter))
        return parameter.detach().expand(self.size, *parameter.shape) if stack is None else stack[self._owners]

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Store each record's gradient of a parameter in the record's row.

        If a layer is applied more than once in a pass, its gradients are added up.

        Args:
            parameter: The trained parameter.
            values: [records, *shape] Its gradient for each record.
        """
        slot = self._slot_of[id(parameter)]
        # the leaf does not compute into the rows directly: a CPU takes a product into memory that is not contiguous
        # record by record
        target, values = self.computed[:, slot.columns], values.flatten(1)
        if id(parameter) in self._written:
            target += values
        else:
            target.copy_(values)
            self._written.add(id(parameter))


def row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each row, with a relative error below 1e-6.

    A long sum of squares in float32 comes out too small, and squares of values below 1e-19 vanish. So at most `_PIECE`
    squares are summed in float32, and rows that could consist of tiny values are summed in float64.

    Args:
        rows: [rows, values] float32.

    Returns:
        [rows] float64; not finite for a row with a value that is not finite or is above 1e19.
    """
    if rows.device.type == "cuda":  # limited by memory, not by arithmetic; and this way the host need not wait
        exact: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        return exact.where(exact < _LARGE, torch.inf)
    whole = rows.shape[1] // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(torch.unflatten(rows[:, :whole], 1, (-1, _PIECE)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    parts = torch.cat([pieces, rest], dim=1)
    norms: torch.Tensor = torch.linalg.vector_norm(_wide(parts), dim=1)
    small = norms < _SMALL
    if bool(small.any()):
        norms[small] = torch.linalg.vector_norm(_wide(rows[small.to(rows.device)]), dim=1)
    return norms


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Return the values in float64, on the CPU if their device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()
