"""Adapter families: which tensors are frozen, trained and sent, and how they make the update.

A family is one file in `fedlora.adapters.families`, whose `FAMILY` is a frozen dataclass. Its fields are the family's
own options, numbers with defaults, checked when it is made. A server names its key and its options; a client makes it
from what is installed there.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from fedlora import registry
from fedlora.adapters.leaves import Diagonal, Linear
from fedlora.plan import Tensors

FAMILIES = "fedlora.adapters.families"


@dataclass(frozen=True)
class Site:
    """A place of the model that is adapted: a linear layer.

    Attributes:
        name: of the module, in full.
        d_out, d_in: of its weight W0, (d_out, d_in) also where the module stores its transpose.
        rank: r.
        scaling: s = alpha / r, the factor on the update.
    """

    name: str
    d_out: int
    d_in: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class TensorSpec:
    """One named float32 tensor.

    Attributes:
        name: "<site>.<factor>" of a tensor of one site, another name of a shared one; "head.<parameter>" of a model
            parameter that is trained directly or is not in the base checkpoint.
        shape: as its family defines it; as in the model for "head.".
        group: "adapter" or "head".
        trains: whether clients train and send it; else it is frozen during a round.
        sites: names of the sites whose update it is part of.
    """

    name: str
    shape: tuple[int, ...]
    group: str = "adapter"
    trains: bool = True
    sites: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class LowRank(NamedTuple):
    """B (d_out, k) and A (k, d_in) with ΔW = s·B·A."""

    B: np.ndarray
    A: np.ndarray


class Bases(NamedTuple):
    """What a start gives for one site.

    Attributes:
        A: (r, d_in), its rows.
        B: (d_out, r), its columns; None of a start that gives none.
    """

    A: torch.Tensor
    B: torch.Tensor | None


Draw = Callable[[str, tuple[int, ...]], torch.Tensor]
"""(name, shape) → standard normal float64 values, of a stream of their own for each name."""


class Leaves:
    """Makes the leaves of an adapter. A tensor that is asked for twice, by several sites, is one and the same.

    Attributes:
        made: tensor name → its leaf and the parameter's name there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.made: dict[str, tuple[nn.Module, str]] = {}

    def linear(self, name: str, d_out: int, d_in: int) -> Linear:
        """x W^T with a tensor W of this name, (d_out, d_in)."""
        if name not in self.made:
            leaf = Linear(d_in, d_out, bias=False, device=self._device)
            nn.init.zeros_(leaf.weight)
            self.made[name] = leaf, "weight"
        return self._known(name, Linear)

    def diagonal(self, name: str, size: int) -> Diagonal:
        """e * x with a tensor e of this name, (size,)."""
        if name not in self.made:
            self.made[name] = Diagonal(size, device=self._device), "scale"
        return self._known(name, Diagonal)

    def _known(self, name: str, kind: type):
        leaf, _ = self.made[name]
        assert type(leaf) is kind, f"{name} is one leaf"
        return leaf


class Delta(nn.Module):
    """s·ΔW·x of one site. A family's `build` makes it."""

    @abstractmethod
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        """What is added to the base layer's output.

        Args:
            x: [..., d_in] in the dtype of the adapter's tensors, after dropout.
            output: [..., d_out], the base layer's.
            base: the base layer.
        """


@dataclass(frozen=True)
class Family(ABC):
    """A family; its subclasses' fields are its options.

    Attributes:
        name: its key.
        exact: whether ΔW is linear in the trained tensors, so that the mean of the models is the model of the mean,
            and noise is not squared.
        bases: which of a start's bases it takes, "A" or "A" and "B".
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    bases: ClassVar[tuple[str, ...]]

    @abstractmethod
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        """Every tensor of the adapter."""

    @abstractmethod
    def build(self, site: Site, leaves: Leaves) -> Delta:
        """The module that computes a site's update; every tensor of `specs` is in a leaf."""

    @abstractmethod
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        """A site's tensors, from a start's bases, such that ΔW = 0."""

    @abstractmethod
    def update(self, state: Tensors, site: Site) -> LowRank:
        """ΔW / s of a site, for export and for server steps that need it whole."""


def family_of(name: str, options: Sequence[tuple[str, float]] = ()) -> Family:
    """The family with this key and these options.

    Raises:
        ValueError: there is none, or it has no such option, or not with this value.
    """
    kind: type[Family] = registry.load(FAMILIES, name).FAMILY
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    values: dict[str, int | float] = {}
    for key, value in options:
        if key not in fields:
            known = f"its options are {', '.join(fields)}" if fields else "it has no options"
            raise ValueError(f"the adapter family {name} has no option {key!r}; {known}")
        if fields[key] == "int" and not float(value).is_integer():
            raise ValueError(f"{key} of the adapter family {name} is {value:g}; it must be a whole number")
        values[key] = int(value) if fields[key] == "int" else float(value)
    return kind(**values)
