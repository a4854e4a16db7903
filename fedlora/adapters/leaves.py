r"""The modules that hold trained tensors: each writes every record's own gradient in the ordinary backward pass.

A leaf is given the loss's gradient g_it at each of its outputs, at the T positions of record i (T = 1 without a
sequence axis). The records of a batch do not see each other, and the loss is the sum of their losses, hence the
gradient of record i's own loss with respect to the leaf's tensors is

    Linear      y = x W^T + b    dW_i = sum_t g_it x_it^T      db_i = sum_t g_it
    Diagonal    y = e * x        de_i = sum_t g_it * x_it

while ordinary training only forms their sum over i. For a low-rank adapter s·B·A, x is the small saved activation A·x
of B, so that dW_i costs little. Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.

Where several clients share a pass, each record meets its own client's tensors: with a sink that routes, W stands for
[records, *shape] values, one for each record. A leaf that serves several places of a model has its gradients added up.

Symbol   Here       Shape
x        inputs     [records, ..., d_in]
g        gradient   [records, ..., d_out]
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F


class Sink(Protocol):
    """Takes the records' gradients; see `fedlora.training.gradient_buffer`."""

    @property
    def armed(self) -> bool:
        """Whether gradients by record are wanted; else leaves are ordinary modules."""

    @property
    def size(self) -> int:
        """How many records' gradients are expected."""

    def routed(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """[records, *shape]: what stands for the parameter, record by record; None where it stands for itself."""

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Take [records, ...] gradients of the parameter."""


class Leaf(nn.Module):
    """A module all of whose tensors may train.

    Attributes:
        sink: where each record's gradients go; None while nobody asks for them.
    """

    sink: Sink | None = None

    @abstractmethod
    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The output for inputs of any leading shape. `tensors` are the leaf's, in the order of `tensors`."""

    @abstractmethod
    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """The output for [records, T, d_in] inputs where each tensor is [records, *shape]."""

    @abstractmethod
    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        """Give the sink each record's gradients of the tensors that require one, from [records, T, d_in] inputs and
        [records, T, d_out] gradients.
        """

    @abstractmethod
    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The gradient of the inputs; `tensor`, the leaf's first, is as in `plain` or, by record, as in `routed`."""

    def tensors(self) -> Sequence[torch.Tensor]:
        """The leaf's parameters, the one that inputs are multiplied with first."""
        return list(self.parameters(recurse=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.sink is not None and self.sink.armed and torch.is_grad_enabled():
            return _PerRecord.apply(inputs, self, *self.tensors())
        return self.plain(inputs, *self.tensors())


class Linear(Leaf, nn.Linear):
    """y = x W^T + b. `weight` is [d_out, d_in], `bias` [d_out] or None."""

    @classmethod
    def of(cls, plain: nn.Linear) -> Linear:
        """A leaf that holds a plain layer's own parameters.

        Raises:
            ValueError: the layer is of a class that computes something of its own.
        """
        if type(plain) is not nn.Linear:
            raise ValueError(f"a trained layer is a {type(plain).__name__}; gradients by record need nn.Linear itself")
        leaf = cls(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        leaf.weight = plain.weight
        if plain.bias is not None:
            leaf.bias = plain.bias
        return leaf

    def tensors(self) -> Sequence[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *tensors)

    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        W, *b = tensors
        return torch.baddbmm(b[0][:, None], x, W.mT) if b else torch.bmm(x, W.mT)

    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        # matrix products sum in float32 or better, whatever they are given
        if self.weight.requires_grad:
            sink.write(self.weight, torch.bmm(g.transpose(1, 2), x))
        if self.bias is not None and self.bias.requires_grad:
            ones = torch.ones(*g.shape[:2], 1, device=g.device, dtype=g.dtype)
            sink.write(self.bias, torch.bmm(g.transpose(1, 2), ones))

    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return torch.bmm(g, tensor) if tensor.dim() == 3 else g @ tensor


class Diagonal(Leaf):
    """y = e * x. `scale`, e, is [size]."""

    def __init__(self, size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size, device=device))

    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return x * tensors[0]

    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return x * tensors[0][:, None]

    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        sink.write(self.scale, (g.float() * x.float()).sum(1))

    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return g * (tensor[:, None] if tensor.dim() == 2 else tensor)


class _PerRecord(torch.autograd.Function):
    """A leaf's output, whose backward pass writes the tensors' gradients by record and returns none for them."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, leaf: Leaf, *tensors: torch.Tensor) -> torch.Tensor:
        sink = leaf.sink
        assert sink is not None
        routed = [sink.routed(tensor) for tensor in tensors]
        apart = routed[0] is not None
        used = [one if one is not None else own for one, own in zip(routed, tensors, strict=True)]
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            precision = torch.get_autocast_dtype(kind)
            inputs, used = inputs.to(precision), [tensor.to(precision) for tensor in used]
        ctx.save_for_backward(inputs, used[0])
        ctx.leaf, ctx.apart = leaf, apart
        if not apart:
            return leaf.plain(inputs, *used)
        return leaf.routed(_by_record(inputs, sink), *used).reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        inputs, tensor = ctx.saved_tensors
        sink = ctx.leaf.sink
        g = _by_record(gradient, sink)
        ctx.leaf.write(_by_record(inputs, sink), g, sink)
        onward = None
        if ctx.needs_input_grad[0]:
            onward = ctx.leaf.input_gradient(g if ctx.apart else gradient, tensor)
            onward = onward.view_as(inputs)
        return (onward, *[None] * (len(ctx.needs_input_grad) - 1))


def _by_record(values: torch.Tensor, sink: Sink) -> torch.Tensor:
    """[records, ..., d] as [records, T, d].

    Raises:
        ValueError: the first axis is not the records'.
    """
    if len(values) != sink.size:
        raise ValueError(f"a trained layer was given {len(values)} rows for {sink.size} records, as by a model that "
                         "flattens its batch: gradients would go to the wrong record. Choose other --targets")
    return values.reshape(sink.size, -1, values.shape[-1])
