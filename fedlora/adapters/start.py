"""Starts: which bases an adapter begins with, drawn once by the server and sent to every client.

A start is one file in `fedlora.adapters.starts`, whose `START` gives each site's bases; the family makes its tensors of
them, so that the update is 0. None of it depends on a private row, but through a noised release that is charged.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from fedlora import registry
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.family import Bases, Family, Site
from fedlora.adapters.layout import AdapterLayout
from fedlora.algebra import leading_factors

STARTS = "fedlora.adapters.starts"

Reads = Literal["nothing", "weights", "public rows", "clients"]


@dataclass(frozen=True)
class Source:
    """What a start may be made from.

    Attributes:
        seed: of all draws.
        weight: a site's frozen weight W0, (d_out, d_in).
        gradient: of a loss on public rows with respect to it, (d_out, d_in); None but for starts that read them.
        sketches: a site's mean of what clients released of their gradients, (Z, Y) as in `fedlora.adapters.sketches`;
            None but for starts that read them.
    """

    seed: int
    weight: Callable[[Site], torch.Tensor]
    gradient: Callable[[Site], torch.Tensor] | None = None
    sketches: Callable[[Site], tuple[torch.Tensor, torch.Tensor]] | None = None

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal float64 values, from the stream of the seed and a name."""
        return gaussian(self.seed, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Float64 values in [-1, 1), from the same stream."""
        return torch.from_numpy(_stream(self.seed, name).uniform(-1, 1, shape))


class Start(ABC):
    """A start. Its file's name is its key, as --init has it.

    Attributes:
        reads: what it is made from; "clients" is a noised release, which is charged as one participation.
        takes: what stands behind a colon, as in public:FILE; "" for nothing. A literal, so that --help can read it.
        gives: the bases that it gives.
        orthonormal: whether rows of A and columns of B are; the rank then cannot exceed a layer's smaller side.
    """

    reads: ClassVar[Reads] = "nothing"
    takes: ClassVar[str] = ""
    gives: ClassVar[tuple[str, ...]] = ("A", "B")
    orthonormal: ClassVar[bool] = True

    @abstractmethod
    def bases(self, site: Site, source: Source) -> Bases:
        """A site's bases, float64."""

    def lacks(self, family: Family) -> tuple[str, ...]:
        """The bases that a family needs and this start does not give; () where the two fit."""
        return tuple(base for base in family.bases if base not in self.gives)


class SingularStart(Start):
    """The leading singular vectors of a matrix of each site's weight's shape."""

    @abstractmethod
    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        """(d_out, d_in)"""

    def bases(self, site: Site, source: Source) -> Bases:
        leading = leading_factors(self.matrix(site, source), site.rank)
        return Bases(A=leading.A, B=leading.B)


def start_of(init: str) -> tuple[Start, str]:
    """The start that --init names, and what stands behind its colon, if anything.

    Raises:
        ValueError: there is none, or it needs a file.
    """
    key, _, argument = init.partition(":")
    start: Start = registry.load(STARTS, key).START()
    if bool(start.takes) != bool(argument):
        raise ValueError(f"--init {init}: " + (f"{key} takes nothing behind a colon" if argument else
                                               f"name what it takes, as in {key}:{start.takes}"))
    return start, argument


def initial_tensors(adapted: AdaptedModel, *, init: str, seed: int,
                    gradient: Callable[[Site], torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """Draw the full state of an adapter.

    A head or other parameter that is missing from the checkpoint is drawn as transformers does for nearly every
    model: matrices from N(0, initializer_range²), biases 0, norms 1. One that is in the checkpoint keeps its value.

    Args:
        adapted: as `attach` made it, nothing written to it yet; it stays so.
        init: as --init has it; what stands behind a colon is not read here.
        seed: of all draws.
        gradient: a site's, (d_out, d_in), for starts that read public rows.

    Returns:
        float32 tensors, one for each of `adapted.layout.state`, in its order.

    Raises:
        ValueError: there is no such start, the family cannot start so, or a rank is above a layer's smaller side.
    """
    source = Source(seed, lambda site: adapted.base_weight(site.name), gradient)
    tensors = adapted.read("state")
    tensors |= site_tensors(adapted.layout, registry.load(STARTS, init.partition(":")[0]).START(), source)
    spread = getattr(adapted.model.config, "initializer_range", 0.02)
    for name in (f"head.{missing}" for missing in adapted.missing):
        shape = tensors[name].shape
        if len(shape) >= 2:
            tensors[name] = float32(spread * source.draw(name, shape))
        else:
            tensors[name] = np.full(shape, 0 if name.endswith("bias") else 1, np.float32)
    return tensors


def site_tensors(layout: AdapterLayout, start: Start, source: Source) -> dict[str, np.ndarray]:
    """The tensors of all sites, as they start.

    Raises:
        ValueError: the family cannot start so, or a rank is above a layer's smaller side.
    """
    if lacking := start.lacks(layout.family):
        raise ValueError(f"the adapter family {layout.family.name} keeps {' and '.join(layout.family.bases)} frozen, "
                         f"and this start gives no {' and no '.join(lacking)}; choose --init orthonormal, weight or "
                         "public:FILE")
    tensors: dict[str, np.ndarray] = {}
    for site in layout.sites:
        if start.orthonormal and site.rank > min(site.d_in, site.d_out):
            raise ValueError(f"rank {site.rank} exceeds the smaller side of {site.name} ({site.d_out} × {site.d_in}); "
                             "choose a smaller --rank, or --init kaiming where the strategy allows it")
        made = layout.family.initial(site, start.bases(site, source), source.draw)
        tensors |= {name: float32(values) for name, values in made.items()}
    return tensors


def _stream(seed: int, name: str) -> np.random.Generator:
    """A stream of its own for each seed and tensor, so that no two layers start alike."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()))


def gaussian(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal float64 values from the stream of one seed and name."""
    return torch.from_numpy(_stream(seed, name).standard_normal(shape))


def float32(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """As it travels."""
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(array, dtype=np.float32)
