r"""Leaves, the modules that hold trained tensors: in the backward pass each computes the gradient of every record.

In the backward pass a leaf receives g_it, the gradient of the loss with respect to its output at each of the T
positions of record i (T = 1 without a sequence axis). The records of a batch do not influence each other, and the loss
is the sum of their losses. Hence the gradient of record i's own loss with respect to the leaf's tensors is

    Linear      y = x W^T + b    dW_i = sum_t g_it x_it^T      db_i = sum_t g_it
    Diagonal    y = e * x        de_i = sum_t g_it * x_it

Ordinary training only forms the sum over i. For a low-rank adapter s·B·A, the input of B is the small activation A·x,
so that dW_i is cheap. See Goodfellow 2015, arXiv:1510.01799; Rochette et al. 2019, arXiv:1912.06015.

If several clients share a pass, each record uses the tensors of its own client. W then stands for [records, *shape]
values, one set for each record (`Sink.routed`). If a leaf is used in several places of a model, its gradients are added
up.

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
from typing_extensions import override


class Sink(Protocol):
    """The receiver of the records' gradients; `fedlora.training.gradient_buffer` has the implementation."""

    @property
    def armed(self) -> bool:
        """Whether each record's gradient is wanted. If not, leaves act as ordinary modules."""

    @property
    def size(self) -> int:
        """The number of records whose gradients are expected."""

    def routed(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Return the values that each record uses in place of the parameter, [records, *shape]; None to use itself."""

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Take each record's gradient of the parameter, [records, *shape]."""


class Leaf(nn.Module):
    """A module whose own tensors may train, and that can compute each record's gradient of them.

    Attributes:
        sink: where each record's gradients go; None if nothing collects them.
    """

    sink: Sink | None = None

    @abstractmethod
    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Compute the output for inputs [..., d_in]. The tensors are the leaf's, in the order of `self.tensors()`."""

    @abstractmethod
    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """Compute the output for inputs [records, T, d_in], where each tensor has values for each record.

        Args:
            x: [records, T, d_in] inputs.
            *tensors: [records, *shape] each, in the order of `self.tensors()`.
        """

    @abstractmethod
    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        """Give the sink each record's gradients of the leaf's tensors that require one.

        Args:
            x: [records, T, d_in] inputs.
            g: [records, T, d_out] gradients of the outputs.
            sink: takes the gradients.
        """

    @abstractmethod
    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the inputs.

        Args:
            g: gradient of the outputs.
            tensor: the leaf's first tensor, shaped as in `plain`, or [records, *shape] as in `routed`.
        """

    def tensors(self) -> Sequence[torch.Tensor]:
        """Return the leaf's parameters. The first is the one that inputs are multiplied with."""
        return list(self.parameters(recurse=False))

    def current(self) -> Sequence[torch.Tensor]:
        """Return the values that a pass uses now, for modules that compute more of them than the leaf does.

        Each is [*shape], or [records, *shape] where clients share the pass. Nothing that is made of them may carry a
        gradient: the sink would not see it.
        """
        sink, own = self.sink, [tensor.detach() for tensor in self.tensors()]
        if sink is None or not (sink.armed and torch.is_grad_enabled()):
            return own
        routed = [sink.routed(tensor) for tensor in self.tensors()]
        return [one if other is None else other for one, other in zip(own, routed, strict=True)]

    @override
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.sink is not None and self.sink.armed and torch.is_grad_enabled():
            output: torch.Tensor = _PerRecord.apply(inputs, self, *self.tensors())  # type: ignore[no-untyped-call]
            return output
        return self.plain(inputs, *self.tensors())


class Linear(Leaf, nn.Linear):
    """A linear leaf, y = x W^T + b. `weight` is [d_out, d_in]; `bias` is [d_out] or None."""

    @classmethod
    def of(cls, plain: nn.Linear) -> Linear:
        """Return a leaf that holds the parameters of an ordinary linear layer.

        Raises:
            ValueError: the layer is of a subclass of nn.Linear, which may compute something else.
        """
        if type(plain) is not nn.Linear:
            raise ValueError(f"a trained layer is a {type(plain).__name__}; gradients by record need nn.Linear itself")
        leaf = cls(plain.in_features, plain.out_features, bias=plain.bias is not None, device="meta")
        leaf.weight = plain.weight
        if plain.bias is not None:
            leaf.bias = plain.bias
        return leaf

    @override
    def tensors(self) -> Sequence[torch.Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @override
    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *tensors)

    @override
    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        W, *b = tensors
        return torch.baddbmm(b[0][:, None], x, W.mT) if b else torch.bmm(x, W.mT)

    @override
    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        # matrix products sum in float32 or better, whatever the dtype of their inputs
        if self.weight.requires_grad:
            sink.write(self.weight, torch.bmm(g.transpose(1, 2), x))
        if self.bias is not None and self.bias.requires_grad:
            ones = torch.ones(*g.shape[:2], 1, device=g.device, dtype=g.dtype)
            sink.write(self.bias, torch.bmm(g.transpose(1, 2), ones))

    @override
    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return torch.bmm(g, tensor) if tensor.dim() == 3 else g @ tensor


class Diagonal(Leaf):
    """A diagonal leaf, y = e * x. Its parameter `scale` is e, [size]."""

    def __init__(self, size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size, device=device))

    @override
    def plain(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return x * tensors[0]

    @override
    def routed(self, x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        return x * tensors[0][:, None]

    @override
    def write(self, x: torch.Tensor, g: torch.Tensor, sink: Sink) -> None:
        if self.scale.requires_grad:
            sink.write(self.scale, (g.float() * x.float()).sum(1))

    @override
    def input_gradient(self, g: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return g * (tensor[:, None] if tensor.dim() == 2 else tensor)


class _PerRecord(torch.autograd.Function):
    """A leaf's output. Its backward pass gives each record's gradients to the sink, and none to autograd."""

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
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
    """Reshape [records, ..., d] to [records, T, d].

    Raises:
        ValueError: the first axis does not have one entry for each record.
    """
    if len(values) != sink.size:
        raise ValueError(f"a trained layer was given {len(values)} rows for {sink.size} records, probably by a model "
                         "that flattens its batch: gradients would go to the wrong record. Choose other --targets")
    return values.reshape(sink.size, -1, values.shape[-1])
