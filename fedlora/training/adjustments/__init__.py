"""Adjustments: what is done to the gradient of a step before the optimiser is given it. Each file here is one.

With privacy the gradient is noised and un-scaled by then, and all else that an adjustment is given was released, or
follows from what was: it is post-processing, costs nothing, and may do what it likes. That the noised gradient is what
was promised is measured before.

A file says `ADJUSTMENT = ` a class of this protocol; its first docstring line is its title.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from fedlora import registry
from fedlora.adapters import AdapterLayout

PACKAGE = "fedlora.training.adjustments"


class Adjustment(Protocol):
    """Made anew, without arguments, for each client and round, so that it may remember earlier steps of the round."""

    @staticmethod
    def fits(layout: AdapterLayout) -> str:
        """Why an adapter cannot be trained so; "" where it can."""

    def __call__(self, gradients: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor],
                 start: Mapping[str, torch.Tensor], layout: AdapterLayout, step: int) -> Mapping[str, torch.Tensor]:
        """The gradients in whose place the optimiser steps: of the same names, shapes and types.

        Args:
            gradients: of the trained tensors, by name; not to be written.
            tensors: all of the adapter's state, as it is before the step; not to be written.
            start: the same at the round's start.
            layout: names, shapes, groups and roles.
            step: counted from 0 in each round.
        """


def check_adjustment(key: str, layout: AdapterLayout) -> None:
    """Raises ValueError where an adapter cannot be trained with this adjustment; "" is none."""
    if key and (why := registry.load(PACKAGE, key).ADJUSTMENT.fits(layout)):
        raise ValueError(f"--adjustment {key}: {why}")


class Adjuster:
    """One client's adjustment in one round, at work on its parameters' `grad`.

    Args:
        key: of the adjustment.
        parameters: behind every tensor of `layout.state`, by name, as the round starts.
    """

    def __init__(self, key: str, layout: AdapterLayout, parameters: Mapping[str, nn.Parameter]) -> None:
        self._adjust: Adjustment = registry.load(PACKAGE, key).ADJUSTMENT()
        self._layout, self._parameters, self._step = layout, parameters, 0
        self._start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @classmethod
    def of(cls, key: str, layout: AdapterLayout, parameters: Mapping[str, nn.Parameter]) -> Adjuster | None:
        """None where the plan names none."""
        return cls(key, layout, parameters) if key else None

    @torch.no_grad()
    def __call__(self) -> None:
        """Put the adjusted gradients of a step in the place of the others."""
        gradients = {spec.name: gradient for spec in self._layout.trained
                     if (gradient := self._parameters[spec.name].grad) is not None}
        tensors = {name: parameter.detach() for name, parameter in self._parameters.items()}
        adjusted = self._adjust(gradients, tensors, self._start, self._layout, self._step)
        assert adjusted.keys() == gradients.keys(), "an adjustment gives each gradient that it is given"
        for name, gradient in adjusted.items():
            self._parameters[name].grad = gradient  # PyTorch refuses another shape or type
        self._step += 1
