"""The base class of starts, which give an adapter its initial values; the server draws them once for all clients.

A start is one file in `fedlora.adapters.starts`, whose `START` provides bases for each site. The family makes its
tensors from them, so that the update is 0. In a private run no start depends on a private row, except through a noised
release, which is charged to the clients' privacy budgets.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from typing_extensions import override

from fedlora import registry
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.family import Bases, Family, Site
from fedlora.adapters.layout import AdapterLayout
from fedlora.algebra import leading_factors, orthonormal_rows
from fedlora.plan.limits import MOST_RANK

STARTS = "fedlora.adapters.starts"

TEXT = "public texts"

Reads = Literal["nothing", "weights", "public texts", "public rows", "clients", "clients without noise"]


@dataclass(frozen=True)
class Source:
    """The values that a start may be computed from.

    Attributes:
        seed: seed of all random draws.
        weight: returns a site's frozen weight W0, (d_out, d_in).
        gradient: returns the gradient of the loss with respect to that weight, (d_out, d_in): on public rows, or the
            mean over clients. None unless the start reads one of them.
        sketches: returns the mean over clients of the released sketches (Z, Y) of a site, which
            `fedlora.adapters.sketches` defines. None unless the start reads them.
        inputs: returns a site's inputs at tokens of public texts, (tokens, d_in). None unless the start reads them.
    """

    seed: int
    weight: Callable[[Site], torch.Tensor]
    gradient: Callable[[Site], torch.Tensor] | None = None
    sketches: Callable[[Site], tuple[torch.Tensor, torch.Tensor]] | None = None
    inputs: Callable[[Site], torch.Tensor] | None = None

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw standard normal float64 values from the random stream of the seed and a name."""
        return gaussian(self.seed, name, shape)

    def uniform(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draw uniform float64 values in [-1, 1) from the random stream of the seed and a name."""
        return torch.from_numpy(_stream(self.seed, name).uniform(-1, 1, shape))


class Start(ABC):
    """A start. The name of its file is its key, as --init has it.

    Attributes:
        reads: class attribute, what the start is computed from. "clients" means a noised release, which is charged as
            one participation; "clients without noise" a release in a run without privacy.
        whole: class attribute, whether clients release whole gradients, and not sketches of them.
        if_private: class attribute, of a start that reads clients without noise, the nearest one from public rows.
        takes: class attribute, what follows the key after a colon, as in public:FILE; "" for nothing. It must be a
            literal, so that --help can read it from the file.
        gives: class attribute, the bases that the start provides, of A, B and V.
        orthonormal: class attribute, whether the rows of A and the columns of B are orthonormal. The rank then cannot
            exceed a layer's smaller side.
    """

    reads: ClassVar[Reads] = "nothing"
    whole: ClassVar[bool] = False
    if_private: ClassVar[str] = "public:FILE"
    takes: ClassVar[str] = ""
    gives: ClassVar[tuple[str, ...]] = ("A", "B")
    orthonormal: ClassVar[bool] = True

    @abstractmethod
    def bases(self, site: Site, source: Source) -> Bases:
        """Return a site's bases, float64."""

    def check_rank(self, site: Site) -> None:
        """Check that a site's rank is one for which the start has bases.

        Raises:
            ValueError: the rank is too large for the layer.
        """
        if self.orthonormal and site.rank > min(site.d_in, site.d_out):
            raise ValueError(f"rank {site.rank} exceeds the smaller side of {site.name} ({site.d_out} × {site.d_in}); "
                             "choose a smaller --rank, or --init kaiming where the strategy allows it")

    def lacks(self, family: Family) -> tuple[str, ...]:
        """Return the bases that a family needs and this start does not provide; () if the two fit."""
        return tuple(base for base in family.bases if base not in self.gives)

    def unfit(self, family: Family) -> str:
        """Return why this start does not suit a family that uses its bases, or one that uses none; "" if it does."""
        return "it gives factors, and the adapter family takes none" if self.gives and not family.bases else ""


class SingularStart(Start):
    """A start from the leading singular vectors of a matrix with the shape of each site's weight."""

    @abstractmethod
    def matrix(self, site: Site, source: Source) -> torch.Tensor:
        """Return the matrix of a site, (d_out, d_in)."""

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        leading = leading_factors(self.matrix(site, source), site.rank)
        return Bases(A=leading.A, B=leading.B)


class OrthogonalStart(Start):
    """A start with random orthonormal bases, in which A reads none of the leading directions of a layer's inputs.

    The directions are the leading right singular vectors of the inputs at tokens of public texts.

    Attributes:
        directions: class attribute, how many directions are left out, if the layer has that many inputs to spare.
    """

    takes = "FILE"
    reads: ClassVar[Reads] = "public texts"
    directions: ClassVar[int]

    @override
    def bases(self, site: Site, source: Source) -> Bases:
        assert source.inputs is not None, "this start is only made with public texts"
        inputs, rows = source.inputs(site).double(), source.draw(f"{site.name}.A", (site.rank, site.d_in))
        if count := min(self.directions, len(inputs), site.d_in - site.rank):
            strongest = leading_factors(inputs, count).A
            rows = rows - rows @ strongest.T @ strongest
        return Bases(A=orthonormal_rows(rows),
                     B=orthonormal_rows(source.draw(f"{site.name}.B", (site.rank, site.d_out))).T)


def reads_inputs(family: Family) -> dict[str, bool]:
    """Return the names of the tensors that a site's inputs are multiplied with ("A"), and whether each trains."""
    site = Site("site", 4 * MOST_RANK, 8 * MOST_RANK, MOST_RANK, 1.0)  # three sizes that tell the axes apart
    return {spec.name.rpartition(".")[2]: spec.trains for spec in family.specs([site]) if spec.shape[-1] == site.d_in}


def fitting(family: Family) -> str:
    """Return the starts that provide what a family needs, as --init takes them, for a message."""
    starts: dict[str, Start] = {key: registry.load(STARTS, key).START() for key in registry.keys(STARTS)}
    fit = [f"{key}:{start.takes}" if start.takes else key for key, start in starts.items()
           if not start.lacks(family) and not start.unfit(family)]
    return " or ".join(part for part in (", ".join(fit[:-1]), *fit[-1:]) if part)


def start_of(init: str) -> tuple[Start, str]:
    """Return the start that --init names, and the text after its colon ("" if there is none).

    Raises:
        ValueError: there is no such start, or the text after the colon is missing or superfluous.
    """
    key, _, argument = init.partition(":")
    start: Start = registry.load(STARTS, key).START()
    if bool(start.takes) != bool(argument):
        raise ValueError(f"--init {init}: " + (f"{key} takes nothing after a colon" if argument else
                                               f"give it a {start.takes}, as in {key}:{start.takes}"))
    return start, argument


def initial_tensors(adapted: AdaptedModel, *, init: str, seed: int,
                    gradient: Callable[[Site], torch.Tensor] | None = None,
                    inputs: Callable[[Site], torch.Tensor] | None = None) -> dict[str, np.ndarray]:
    """Draw the initial values of all tensors of an adapter.

    A head, or another parameter that is missing from the checkpoint, is drawn as transformers does for nearly every
    model: matrices from N(0, initializer_range²), biases 0, norm weights 1. A parameter that is in the checkpoint keeps
    its value.

    Args:
        adapted: the model as `attach` made it, before anything is written to it. It is not changed.
        init: the start, as --init has it. The text after a colon is not used here.
        seed: seed of all random draws.
        gradient: returns a site's gradient, (d_out, d_in), for starts that read public rows.
        inputs: returns a site's inputs, (tokens, d_in), for starts that read public texts.

    Returns:
        float32 arrays, one for each tensor of `adapted.layout.state`, in its order.

    Raises:
        ValueError: there is no such start, it does not provide what the family needs, or a rank exceeds a layer's
            smaller side.
    """
    source = Source(seed, lambda site: adapted.base_weight(site.name), gradient, inputs=inputs)
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
    """Return the initial values of the tensors of all sites, float32.

    Raises:
        ValueError: the start does not provide what the family needs or does not suit it, or a rank exceeds a layer's
            smaller side.
    """
    if lacking := start.lacks(layout.family):
        raise ValueError(f"the adapter family {layout.family.name} needs {' and '.join(layout.family.bases)} of a "
                         f"start, and this one gives no {' and no '.join(lacking)}; choose --init "
                         f"{fitting(layout.family)}")
    if why := start.unfit(layout.family):
        raise ValueError(f"this start does not suit the adapter family {layout.family.name}: {why}; choose --init "
                         f"{fitting(layout.family)}")
    tensors: dict[str, np.ndarray] = {}
    for site in layout.sites:
        start.check_rank(site)
        made = layout.family.initial(site, start.bases(site, source), source.draw)
        tensors |= {name: float32(values) for name, values in made.items()}
    return tensors


def _stream(seed: int, name: str) -> np.random.Generator:
    """Return the random stream of a seed and a tensor's name, so that no two layers start alike."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()))


def gaussian(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw standard normal float64 values from the random stream of a seed and a name."""
    return torch.from_numpy(_stream(seed, name).standard_normal(shape))


def float32(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """Return the values as a contiguous float32 array on the CPU, as they are sent."""
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    return np.ascontiguousarray(array, dtype=np.float32)
