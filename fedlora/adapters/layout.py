"""The layout of an adapter: its tensors and which of them train. Both sides check received arrays against it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.adapters.family import Family, Site, TensorSpec
from fedlora.plan import RoundPlan, Tensors

MOST_VALUE = 1e18
"""Largest magnitude of a tensor's value. Sums and products of larger values can leave float32's range and end a run."""

MOST_TRAINED = 1e16
"""Largest magnitude of a value that a client sends. FedSVD can gather √rank times as much in one value of the next
state, which must stay below `MOST_VALUE`."""


MOST_RECEIVED = 1e4
"""Largest magnitude of a received value with which a client trains privately. Training stays far below it.

This is the second defence after `fedlora.training.batch_invariance`: if another record did influence the rounding of a
record's gradient, a server could not magnify that influence much."""


@dataclass(frozen=True)
class AdapterLayout:
    """All tensors that are not in the base checkpoint, and the family that forms the update from them.

    Attributes:
        family: the adapter family.
        sites: the adapted layers, sorted by name.
        trained: the tensors that a client trains and uploads, sorted by name.
        frozen: the tensors that are fixed during a round (frozen factors, and frozen parameters that are missing from
            the checkpoint), sorted by name.
    """

    family: Family
    sites: tuple[Site, ...]
    trained: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, family: Family, sites: Iterable[Site], heads: Iterable[TensorSpec] = ()) -> AdapterLayout:
        """Return the layout of a family's tensors for these sites, and of the parameters outside the adapters.

        Args:
            family: the adapter family.
            sites: the adapted layers.
            heads: specs of the model's own parameters that train, or that are missing from the base checkpoint.

        Raises:
            ValueError: two tensors have the same name.
        """
        placed = tuple(sorted(sites, key=lambda site: site.name))
        specs = sorted([*family.specs(placed), *heads], key=lambda spec: spec.name)
        if twice := next((one.name for one, other in itertools.pairwise(specs) if one.name == other.name), None):
            raise ValueError(f"the adapter family {family.name} gives two tensors the name {twice!r}")
        return cls(family, placed, tuple(spec for spec in specs if spec.trains),
                   tuple(spec for spec in specs if not spec.trains))

    def activated(self, active: Collection[str]) -> AdapterLayout:
        """Return the layout in which only the trained tensors with these names train, and all others are frozen."""
        specs = sorted((dataclasses.replace(spec, trains=spec.trains and spec.name in active) for spec in self.state),
                       key=lambda spec: spec.name)
        return dataclasses.replace(self, trained=tuple(spec for spec in specs if spec.trains),
                                   frozen=tuple(spec for spec in specs if not spec.trains))

    def narrowed(self, prefixes: Mapping[str, int]) -> AdapterLayout:
        """Return the layout in which sites have a smaller rank, with the tensors' first rows and columns alone.

        The factor s of a site's update stays as it is.

        Args:
            prefixes: site → rank, for the sites whose rank is smaller.

        Raises:
            ValueError: the family's tensors cannot be cut, there is no such site, or it has no such rank.
        """
        if not prefixes:
            return self
        if not self.family.narrows:
            raise ValueError(f"adapters of the family {self.family.name} cannot be trained in some of their ranks "
                             "alone; lora and frozen-a can")
        ranks = {site.name: site.rank for site in self.sites}
        if unknown := prefixes.keys() - ranks.keys():
            raise ValueError(f"a rank is given for modules that are not adapted: {_some(unknown)}")
        for name, rank in prefixes.items():
            if not 1 <= rank <= ranks[name]:
                raise ValueError(f"rank {rank} is given for {name}; it must be from 1 to its own, {ranks[name]}")
        sites = tuple(dataclasses.replace(site, rank=prefixes.get(site.name, site.rank)) for site in self.sites)
        shapes = {spec.name: spec.shape for spec in self.family.specs(sites)}
        trained, frozen = (tuple(dataclasses.replace(spec, shape=shapes.get(spec.name, spec.shape)) for spec in specs)
                           for specs in (self.trained, self.frozen))
        return AdapterLayout(self.family, sites, trained, frozen)

    def in_round(self, order: RoundPlan) -> AdapterLayout:
        """Return the layout of the tensors that an order trains and that are frozen meanwhile.

        Raises:
            ValueError: the order's ranks do not fit the adapter.
        """
        narrowed = self.narrowed(dict(order.prefixes))
        return narrowed.activated(order.active) if order.active else narrowed

    def sent_in(self, prefixes: Mapping[str, int]) -> AdapterLayout:
        """Return the layout of what travels to clients: trained tensors of these ranks, and whole frozen ones.

        Frozen tensors are whole so that a client that holds them need not be sent them again in a round of other ranks.

        Raises:
            ValueError: the ranks do not fit the adapter.
        """
        return dataclasses.replace(self, trained=self.narrowed(prefixes).trained)

    def cut(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """Return the part of tensors of a larger rank that this layout has: the first rows and columns."""
        shapes = {spec.name: spec.shape for spec in self.state}
        return {name: array if array.shape == shapes[name] else np.ascontiguousarray(
            array[tuple(map(slice, shapes[name]))]) for name, array in tensors.items()}

    def resent(self, shapes: Mapping[str, tuple[int, ...]]) -> AdapterLayout:
        """Return the layout of an upload that was accepted before, for which nothing but its size matters.

        Args:
            shapes: tensor → the shape that it has there. Those that are within the whole tensor's are taken over.
        """
        def within(spec: TensorSpec) -> tuple[int, ...]:
            shape = shapes[spec.name]
            return tuple(map(min, spec.shape, shape)) if len(shape) == len(spec.shape) else spec.shape

        return dataclasses.replace(self, trained=tuple(
            dataclasses.replace(spec, shape=within(spec)) for spec in self.trained if spec.name in shapes))

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """The trained and the frozen tensors together, sorted by name."""
        return tuple(sorted(self.trained + self.frozen, key=lambda spec: spec.name))

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the adapted modules, sorted."""
        return tuple(site.name for site in self.sites)

    @property
    def rank(self) -> int:
        """The largest rank of any site; 0 if nothing is adapted."""
        return max((site.rank for site in self.sites), default=0)

    @property
    def num_trained(self) -> int:
        """The number of trained values, which is the length of one record's gradient."""
        return sum(spec.size for spec in self.trained)

    @np.errstate(over="ignore", invalid="ignore")
    def check(self, tensors: Tensors, which: str, most: float | None = None) -> None:
        """Check all arrays received from the other side, before any of them is used.

        Args:
            tensors: the received arrays.
            which: the tensors that they should be: "trained", "frozen", or "state" for both.
            most: largest allowed magnitude of a value; None for `MOST_TRAINED` if `which` is "trained", else
                `MOST_VALUE`.

        Raises:
            ValueError: a name is missing or unknown; a shape, dtype or byte order is wrong; or a value is not finite or
                is larger than `most`.
        """
        if most is None:
            most = MOST_TRAINED if which == "trained" else MOST_VALUE
        specs = {spec.name: spec for spec in getattr(self, which)}
        if tensors.keys() != specs.keys():
            raise ValueError(f"the {which} tensors' names do not fit the adapter: "
                             f"{_some(specs.keys() - tensors.keys())} missing, "
                             f"{_some(tensors.keys() - specs.keys())} unknown")
        for name, spec in specs.items():
            array = tensors[name]
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                raise ValueError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}; it must be float32")
            if array.shape != spec.shape:
                raise ValueError(f"{name} has shape {array.shape}; it must be {spec.shape}")
            if not _within(array, most):
                raise ValueError(f"{name} holds a value that is not finite or is beyond {most:g}; if training made "
                                 "it so, a lower learning rate helps")


def pasted(parts: Tensors, whole: Tensors) -> dict[str, np.ndarray]:
    """Return copies of whole tensors with their first rows and columns replaced; the inverse of `cut`.

    Args:
        parts: the replacements. A part of its whole tensor's shape is returned as it is.
        whole: the whole tensors, of at least the names in `parts`.
    """
    made = {}
    for name, part in parts.items():
        if part.shape == whole[name].shape:
            made[name] = part
        else:
            made[name] = whole[name].astype(part.dtype)
            made[name][tuple(map(slice, part.shape))] = part
    return made


def _within(array: np.ndarray, most: float) -> bool:
    """Return whether every value is a number of at most this magnitude. Call it with numpy's warnings off.

    A sum of squares below `most` bounds every value, and takes a third of the time of a minimum and a maximum. Only if
    it is too large, or not a number, is each value checked.
    """
    values = array.reshape(-1)
    return bool(np.dot(values, values) < most or np.all(np.abs(values) <= most))


def _some(names: set[str]) -> str:
    """List at most three names, quoted, and count the rest. Long names are cut, as they come from the other side."""
    if not names:
        return "none"
    shown = ", ".join(repr(str(name)[:80]) for name in sorted(names, key=str)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
