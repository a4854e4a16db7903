"""Adjustments of a step's gradient before the optimizer gets it: each file of this folder is one, found by its name.

Under privacy an adjustment sees the gradient after noise was added and the groups' scales were divided out. Everything
else that it is given follows from values that were released before. The adjustment is therefore post-processing: it
costs no privacy and may compute anything. The runtime checks measure the noised gradient before it is adjusted.

A file defines `ADJUSTMENT`, a class that fits the protocol `Adjustment`, or `StepAdjustment` too if it changes the
optimizer's steps. The first line of the file's docstring is its title in `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fedlora import registry
from fedlora.adapters import AdapterLayout

PACKAGE = "fedlora.training.adjustments"


class Adjustment(Protocol):
    """A change to the gradients of each step.

    A fresh one is made, without arguments, for each client and round. So it may remember earlier steps of the round.
    """

    @staticmethod
    def fits(layout: AdapterLayout) -> str:
        """Return why an adapter of this layout cannot be trained with the adjustment, or "" if it can."""

    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        """Return the gradients that the optimizer shall use in place of the given ones.

        Args:
            gradients: Tensor name → gradient, for the tensors that train. Must not be written to.
            tensors: Tensor name → present value, before the step, for the adapter's whole state. Must not be written
                to.
            start: Tensor name → value at the start of the round. Must not be written to.
            layout: The names, shapes, groups and roles of the tensors.
            step: The number of the step in the round, from 0.

        Returns:
            Gradients with the same names, shapes and dtypes.
        """


@runtime_checkable
class StepAdjustment(Protocol):
    """The second half of an adjustment that changes the optimizer's steps too.

    An adaptive optimizer divides the length of a gradient out again. A rule about the length of a step must act on the
    step itself.
    """

    def moved(self, changes: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor], layout: AdapterLayout,
              step: int) -> Mapping[str, torch.Tensor]:
        """Return the changes of the values that shall take place of those that the optimizer made.

        No value may change by more than the optimizer changed it, because the server's screening goes by how far the
        optimizer can move a value.

        Args:
            changes: Tensor name → value after the optimizer's step minus value before it, for the tensors that train.
                Must not be written to.
            before: Tensor name → value before the step, for the tensors that train. Must not be written to.
            layout: The names, shapes, groups and roles of the tensors.
            step: The number of the step in the round, from 0.

        Returns:
            Changes with the same names, shapes and dtypes. A tensor whose change is the given object itself keeps the
            optimizer's bits.
        """


def check_adjustment(key: str, layout: AdapterLayout) -> None:
    """Check that an adapter of this layout can be trained with an adjustment.

    Args:
        key: The adjustment's name; "" for none.
        layout: The adapter's tensors.

    Raises:
        ValueError: The adapter cannot be trained with the adjustment, or no adjustment of this name is installed.
    """
    if key and (why := registry.load(PACKAGE, key).ADJUSTMENT.fits(layout)):
        raise ValueError(f"--adjustment {key}: {why}")


class Adjuster:
    """The adjustment of one client in one round, applied to its parameters' `grad` and to the optimizer's steps.

    Args:
        key: The adjustment's name.
        layout: The adapter's tensors.
        parameters: Tensor name → parameter, for the whole of `layout.state`, with the values of the round's start.
    """

    def __init__(self, key: str, layout: AdapterLayout, parameters: Mapping[str, nn.Parameter]) -> None:
        self._adjust: Adjustment = registry.load(PACKAGE, key).ADJUSTMENT()
        self._layout, self._parameters, self._step = layout, parameters, 0
        self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._before: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, key: str, layout: AdapterLayout, parameters: Mapping[str, nn.Parameter]) -> Adjuster | None:
        """Return the adjuster for a key of the plan, or None if the key is ""."""
        return cls(key, layout, parameters) if key else None

    @torch.no_grad()
    def __call__(self) -> None:
        """Replace the gradients of a step by the adjusted ones."""
        gradients = {spec.name: gradient for spec in self._layout.trained
                     if (gradient := self._parameters[spec.name].grad) is not None}
        tensors = {name: parameter.detach() for name, parameter in self._parameters.items()}
        adjusted = self._adjust(gradients, tensors, self._start, self._layout, self._step)
        assert adjusted.keys() == gradients.keys(), "an adjustment must return every gradient that it was given"
        for name, gradient in adjusted.items():
            self._parameters[name].grad = gradient  # PyTorch refuses another shape or dtype
        if isinstance(self._adjust, StepAdjustment):
            self._before = {name: tensors[name].clone() for name in gradients}
        self._step += 1

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of an optimizer over the parameters changed as the adjustment says.

        Args:
            optimizer: The optimizer. Each of its steps must follow a call of the adjuster.
        """
        if isinstance(self._adjust, StepAdjustment):
            optimizer.register_step_post_hook(self._moved)

    @torch.no_grad()
    def _moved(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        assert isinstance(self._adjust, StepAdjustment)
        before, self._before = self._before, {}
        changes = {name: self._parameters[name].detach() - value for name, value in before.items()}
        for name, change in self._adjust.moved(changes, before, self._layout, self._step - 1).items():
            if change is not changes[name]:
                self._parameters[name].copy_(before[name] + change)
