"""Which tensors an adapter consists of, and which of them train: the contract that both sides check arrays against."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from fedlora.adapters.family import Family, Site, TensorSpec
from fedlora.plan import Tensors

MOST_VALUE = 1e18
"""Of a tensor, in magnitude: sums and products of larger ones leave float32's range, and would end a run."""

MOST_TRAINED = 1e16
"""Of a tensor that a client sends: FedSVD gathers up to √rank times as much in one value of the next state."""


MOST_RECEIVED = 1e4
"""Of a tensor from which a client trains privately: far above what training makes. The second line behind
`fedlora.training.batch_invariance`: what could be rounded by other records cannot be magnified much either."""


@dataclass(frozen=True)
class AdapterLayout:
    """All tensors that are not in the base checkpoint, and how they make the update.

    Attributes:
        family: which tensors there are and which train.
        sites: what is adapted, by name.
        trained: what a client trains and uploads, sorted by name.
        frozen: what is fixed during a round (frozen factors, frozen parameters missing from the checkpoint), sorted
            by name.
    """

    family: Family
    sites: tuple[Site, ...]
    trained: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, family: Family, sites: Iterable[Site], heads: Iterable[TensorSpec] = ()) -> AdapterLayout:
        """The family's tensors for these sites, and the parameters outside of the adapters.

        Raises:
            ValueError: two tensors have one name.
        """
        placed = tuple(sorted(sites, key=lambda site: site.name))
        specs = sorted([*family.specs(placed), *heads], key=lambda spec: spec.name)
        if twice := next((one.name for one, other in itertools.pairwise(specs) if one.name == other.name), None):
            raise ValueError(f"the adapter family {family.name} names two tensors {twice!r}")
        return cls(family, placed, tuple(spec for spec in specs if spec.trains),
                   tuple(spec for spec in specs if not spec.trains))

    def activated(self, active: Collection[str]) -> AdapterLayout:
        """The layout in which the trained tensors with these names train, and the others are frozen."""
        specs = sorted((dataclasses.replace(spec, trains=spec.trains and spec.name in active) for spec in self.state),
                       key=lambda spec: spec.name)
        return dataclasses.replace(self, trained=tuple(spec for spec in specs if spec.trains),
                                   frozen=tuple(spec for spec in specs if not spec.trains))

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """Trained and frozen together, sorted by name."""
        return tuple(sorted(self.trained + self.frozen, key=lambda spec: spec.name))

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted modules, sorted."""
        return tuple(site.name for site in self.sites)

    @property
    def rank(self) -> int:
        """The largest of the sites' ranks; 0 where nothing is adapted."""
        return max((site.rank for site in self.sites), default=0)

    @property
    def num_trained(self) -> int:
        """Number of trained values: the length of one record's gradient."""
        return sum(spec.size for spec in self.trained)

    @np.errstate(over="ignore", invalid="ignore")
    def check(self, tensors: Tensors, which: str, most: float | None = None) -> None:
        """Check arrays from the other side, whole, before any of them is used.

        Args:
            tensors: what came.
            which: "trained", "frozen" or "state": what should have come.
            most: largest magnitude of a value; None for `MOST_VALUE`, or of "trained" `MOST_TRAINED`.

        Raises:
            ValueError: a name is missing or unknown; a shape, dtype or byte order is wrong; a value is not finite or
                beyond `most`.
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


def _within(array: np.ndarray, most: float) -> bool:
    """Whether every value is a number of at most this magnitude. Called with numpy's warnings off.

    A sum of squares bounds each of them, in a third of the time that a minimum and a maximum take. Where it is too
    large or not a number, each value is looked at.
    """
    values = array.reshape(-1)
    return bool(np.dot(values, values) < most or np.all(np.abs(values) <= most))


def _some(names: set[str]) -> str:
    """At most three of the names, quoted, and how many more; names from the other side are cut short."""
    if not names:
        return "none"
    shown = ", ".join(repr(str(name)[:80]) for name in sorted(names, key=str)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
