"""The base class of adapter families: which tensors are frozen, trained and sent, and how they form the update.

A family is one file in `fedlora.adapters.families`, whose `FAMILY` is a frozen dataclass. The fields of that dataclass
are the family's own options: numbers with defaults, checked when an instance is made. A server sends a family's key and
options. A client makes the instance from the code installed on its own machine.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from fedlora import registry
from fedlora.adapters.leaves import Diagonal, Linear
from fedlora.adapters.updates import Update
from fedlora.plan import Tensors

FAMILIES = "fedlora.adapters.families"

_Leaf = TypeVar("_Leaf", Linear, Diagonal)


@dataclass(frozen=True)
class Site:
    """A linear layer of the model that is adapted.

    Attributes:
        name: the module's full name.
        d_out: number of outputs. The weight W0 counts as (d_out, d_in), even if the module stores its transpose.
        d_in: number of inputs.
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
    """Name, shape and role of one float32 tensor.

    Attributes:
        name: "<site>.<factor>" for a tensor of one site; another name for a tensor that sites share; "head.<parameter>"
            for a model parameter that is trained directly or is missing from the base checkpoint.
        shape: the shape that the family defines; for "head.", the parameter's own.
        group: "adapter" or "head".
        trains: whether clients train and send it. If not, it is frozen during a round.
        sites: names of the sites whose update it is part of.
    """

    name: str
    shape: tuple[int, ...]
    group: str = "adapter"
    trains: bool = True
    sites: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


class Bases(NamedTuple):
    """The bases that a start provides for one site.

    Attributes:
        A: (r, d_in). The rows of A span the inputs that the update reads. (0, d_in) if the start provides no A.
        B: (d_out, r). The columns of B span the outputs that it writes. None if the start provides no B.
        V: (d_out,). One over the length of each row of W0. None if the start does not provide it.
    """

    A: torch.Tensor
    B: torch.Tensor | None
    V: torch.Tensor | None = None


Draw = Callable[[str, tuple[int, ...]], torch.Tensor]
"""(name, shape) → standard normal float64 values. Each name has a random stream of its own."""


class Leaves:
    """A factory for the leaves of an adapter. Sites that ask for the same tensor name share one leaf.

    Attributes:
        made: tensor name → its leaf, and the name of the leaf's parameter.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.made: dict[str, tuple[nn.Module, str]] = {}

    def linear(self, name: str, d_out: int, d_in: int) -> Linear:
        """Return the leaf that computes x W^T, where W is the (d_out, d_in) tensor of this name."""
        if name not in self.made:
            leaf = Linear(d_in, d_out, bias=False, device=self._device)
            nn.init.zeros_(leaf.weight)
            self.made[name] = leaf, "weight"
        return self._known(name, Linear)

    def diagonal(self, name: str, size: int) -> Diagonal:
        """Return the leaf that computes e * x, where e is the (size,) tensor of this name."""
        if name not in self.made:
            self.made[name] = Diagonal(size, device=self._device), "scale"
        return self._known(name, Diagonal)

    def _known(self, name: str, kind: type[_Leaf]) -> _Leaf:
        leaf, _ = self.made[name]
        assert type(leaf) is kind, f"{name} is a {kind.__name__} wherever it is used"
        return leaf


class Delta(nn.Module):
    """The module that computes one site's update s·ΔW·x. A family's `build` makes it."""

    @abstractmethod
    def forward(self, x: torch.Tensor, output: torch.Tensor, base: nn.Module) -> torch.Tensor:
        """Return what is added to the base layer's output, [..., d_out].

        Args:
            x: [..., d_in] input in the dtype of the adapter's tensors, after dropout.
            output: [..., d_out] output of the base layer.
            base: the base layer.
        """


@dataclass(frozen=True)
class Family(ABC):
    """An adapter family. The dataclass fields of a subclass are the family's options.

    Attributes:
        name: class attribute, the family's key.
        exact: class attribute, whether ΔW is linear in the trained tensors. Then averaging the tensors averages the
            updates exactly, and no product of two noises occurs. An option under which it is linear after all is a
            matter of `exact_in`.
        bases: class attribute, which bases the family takes from a start: ("A",), ("A", "B") or ("V",); () for none.
        narrows: class attribute, whether a round can train the first ranks alone: each site's tensors are A
            (r, d_in) and B (d_out, r), with ΔW / s = B·A, and the first k rows of A and columns of B are an adapter of
            rank k. Not inherited, because a subclass may compute anything else.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    bases: ClassVar[tuple[str, ...]]
    narrows: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.narrows = vars(cls).get("narrows", False)

    @abstractmethod
    def specs(self, sites: Sequence[Site]) -> Sequence[TensorSpec]:
        """Return the spec of every tensor of the adapter."""

    @abstractmethod
    def build(self, site: Site, leaves: Leaves) -> Delta:
        """Build the module that computes a site's update. It must take every tensor of `specs` from `leaves`."""

    @abstractmethod
    def initial(self, site: Site, bases: Bases, draw: Draw) -> Mapping[str, torch.Tensor | np.ndarray]:
        """Return the initial values of a site's tensors, by name. They must give ΔW = 0.

        Args:
            site: the site.
            bases: the bases that the start provides for it.
            draw: source of random values, for tensors that no base decides.
        """

    def exact_in(self, trained: Collection[str]) -> bool:
        """Return whether ΔW is linear in these trained tensors, while all others stay as they are.

        Args:
            trained: names of trained tensors, of which some may be left out in a round.
        """
        return self.exact

    def why_not_private(self) -> str:
        """Return why private runs refuse the family with these options, and what to do; "" where they take it."""
        return ""

    def by_token(self, site: Site) -> bool:
        """Return whether what is added to a site's output is another function of each token than ΔW·x with one ΔW.

        Such an adapter has no `update`. It can be neither merged nor exported, and is saved in our own form.
        """
        return False

    @abstractmethod
    def update(self, state: Tensors, site: Site) -> Update:
        """Return ΔW / s for a site, for export and for server steps that need the whole update.

        Raises:
            ValueError: there is none, because of `by_token`.
        """


def family_of(name: str, options: Sequence[tuple[str, float]] = ()) -> Family:
    """Return the family with this key and these options.

    Args:
        name: a key of `fedlora.adapters.families`.
        options: (name, value) of the options that are not at their default.

    Raises:
        ValueError: there is no such family or option, or the option cannot have this value.
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


def check_private(family: Family) -> None:
    """Check that private runs may use a family.

    Raises:
        ValueError: they may not. The message has the family's reason and what to do.
    """
    if why := family.why_not_private():
        raise ValueError(f"the adapter family {family.name} is not for private runs: {why}, or choose --privacy off")
