r"""Gradients of each record, as a by-product of the ordinary backward pass.

A linear layer y = x W^T + b, applied at the T positions of record i (T = 1 without a sequence axis), is given the
loss's gradient g_it at each of its outputs. The records of a batch do not see each other, and the loss is the sum of
their losses, hence the gradient of record i's own loss is

    dW_i = sum_t g_it x_it^T        db_i = sum_t g_it

while ordinary training only forms sum_i dW_i. For a low-rank adapter s·B·A, x is the small saved activation A·x of B,
so that dW_i costs little. `PerExampleLinear` writes it into its slice of one flat `GradientBuffer`, in the same pass,
instead of the sum. Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.

Symbol   Here          Shape
x        inputs        [records, ..., d_in]
g        gradient      [records, ..., d_out]
dW, db   buffer.rows   [records, d_out·d_in], [records, d_out], slices of [records, values]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

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

    Its memory is kept between micro-batches and grows to the largest. Armed, it takes what the layers write; unarmed,
    they behave as plain linear layers.

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

    def write_product(self, parameter: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Store the parameter's gradients, left_i @ right_i for each record i, in the rows.

        Those of a layer that is applied more than once in a pass are added up.

        Args:
            left, right: [records, a, k] and [records, k, b] in the precision of the model, where a·b is the
                parameter's number of values. Matrix products sum in float32 or better, whatever they are given.
        """
        slot = self._slot_of[id(parameter)]
        # not `out=` the rows: a product into memory that is not contiguous is taken record by record on a CPU
        product = torch.bmm(left, right).flatten(1)
        target = self.computed[:, slot.columns]
        if id(parameter) in self._written:
            target += product
        else:
            target.copy_(product)
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


class PerExampleLinear(nn.Linear):
    """A trained linear layer with a gradient buffer. Made by `per_example`, which swaps the class of a plain one."""

    buffer: GradientBuffer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.buffer.armed and torch.is_grad_enabled():
            return _LinearPerExample.apply(inputs, self.weight, self.bias, self)
        return super().forward(inputs)

    def by_record(self, values: torch.Tensor) -> torch.Tensor:
        """[records, ..., d] as [records, T, d].

        Raises:
            ValueError: the first axis is not the records'.
        """
        records = len(self.buffer.computed)
        if len(values) != records:
            raise ValueError(f"a trained layer was given {len(values)} rows for {records} records, as by a model that "
                             "flattens its batch: gradients would go to the wrong record. Choose other --targets")
        return values.reshape(records, -1, values.shape[-1])

    def write(self, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """dW_i and db_i, from what the backward pass has in the precision of the model."""
        x, g = self.by_record(inputs), self.by_record(gradient)
        if self.weight.requires_grad:
            self.buffer.write_product(self.weight, g.transpose(1, 2), x)
        if self.bias is not None and self.bias.requires_grad:
            ones = torch.ones(*g.shape[:2], 1, device=g.device, dtype=g.dtype)
            self.buffer.write_product(self.bias, g.transpose(1, 2), ones)


class _LinearPerExample(torch.autograd.Function):
    """F.linear, whose backward pass writes the parameters' gradients per record and returns none for them."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                layer: PerExampleLinear) -> torch.Tensor:
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            precision = torch.get_autocast_dtype(kind)
            inputs, weight = inputs.to(precision), weight.to(precision)
            bias = None if bias is None else bias.to(precision)
        ctx.save_for_backward(inputs, weight)
        ctx.layer = layer
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:  # type: ignore[override]
        inputs, weight = ctx.saved_tensors
        ctx.layer.write(inputs, gradient)
        onward = gradient @ weight if ctx.needs_input_grad[0] else None
        return onward, None, None, None


def per_example(leaves: Sequence[nn.Linear], buffer: GradientBuffer) -> None:
    """Have these layers write to `buffer` whenever it is armed: the class is swapped in place, parameters stay."""
    for leaf in leaves:
        if type(leaf) not in (nn.Linear, PerExampleLinear):
            raise ValueError(f"a trained layer is a {type(leaf).__name__}; per-record gradients need nn.Linear itself")
        leaf.__class__ = PerExampleLinear
        leaf.buffer = buffer  # type: ignore[assignment]
