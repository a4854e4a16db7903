"""A recipe: an adapter family, a start, what the server does, and the values of a run that names no others.

One paper, one file of `recipes/`, in the paper's order. The presets' constants were found on the demo's made-up notes
and on public text (SST-2), never on a user's data. Orthonormal A makes the effective step about three times that of
Kaiming A (row norm ≈ 1/√3), so rates are per recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fedlora import registry
from fedlora.adapters import AdapterLayout

from .reductions import Reduction
from .reductions.mean import Mean
from .refactorizations import Refactorization
from .schedules import Schedule
from .schedules.constant import Constant
from .server_optimizers import ServerOptimizer
from .step import ServerStep

RECIPES, OPTIMIZERS = "fedlora_strategies.recipes", "fedlora_strategies.server_optimizers"

_SLOTS = ("reduction", "refactorization", "schedule")
"""Whose options are the recipe's own; the optimiser's are named apart."""


@dataclass(frozen=True)
class Preset:
    """Defaults of one (recipe, private); see `RunPlan` for their meaning. `batch_size` is its expected_batch, `init`
    the start: that of the recipe where it is empty.
    """

    rank: int
    alpha: float
    optimizer: str
    lr: float
    local_steps: int
    batch_size: int
    clip_norm: float
    head_scale: float
    rounds: int
    lr_schedule: str
    targets: tuple[str, ...]
    init: str = ""

    @classmethod
    def open(cls, rank: int, alpha: float, lr: float) -> Preset:
        """All linear layers, where privacy adapts query and value: without noise, values cost nothing but bytes."""
        return cls(rank, alpha, "adamw", lr, local_steps=8, batch_size=32, clip_norm=1.0, head_scale=1.0, rounds=25,
                   lr_schedule="linear", targets=("all",))

    @classmethod
    def private(cls, rank: int, alpha: float, lr: float, *, clip_norm: float, head_scale: float) -> Preset:
        """The clip norm is for the middle of the run, not for its start: adapters' gradients are tiny until the head
        has grown, then those of misjudged records are the longest, and clipping them all to one length turns the mean
        around.
        """
        return cls(rank, alpha, "adamw", lr, local_steps=4, batch_size=256, clip_norm=clip_norm, head_scale=head_scale,
                   rounds=20, lr_schedule="linear", targets=("auto",))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a strategy is made of.

    Attributes:
        family: key of `fedlora.adapters.families`: what is trained, frozen and sent.
        start: how the adapters begin, as --init names it.
        reduction, optimizer, refactorization, schedule: what the server does, see `ServerStep`.
        private, open: the values of a run with privacy and without.
        presets_of: start → recipe whose presets suit with it, in place of these.
    """

    family: str
    start: str
    reduction: Reduction = field(default_factory=Mean)
    optimizer: ServerOptimizer | None = None
    refactorization: Refactorization | None = None
    schedule: Schedule = field(default_factory=Constant)
    private: Preset
    open: Preset
    presets_of: Mapping[str, str] = field(default_factory=dict)

    def preset(self, private: bool, start: str | None = None) -> Preset:
        """The values of a run that names none, or no other than its start."""
        if start is not None and start in self.presets_of:
            return registry.load(RECIPES, self.presets_of[start]).RECIPE.preset(private)
        chosen = self.private if private else self.open
        return dataclasses.replace(chosen, init=chosen.init or self.start)

    def step(self, layout: AdapterLayout, rounds: int, seed: int) -> ServerStep:
        """What the server does in a run of so many rounds.

        Raises:
            ValueError: it cannot serve adapters of this layout.
        """
        return ServerStep(layout, self.reduction, self.optimizer, self.refactorization, self.schedule, rounds, seed)

    def with_options(self, options: Mapping[str, float]) -> Recipe:
        """With other values for options of the reduction, the refactorisation or the schedule.

        Raises:
            ValueError: none of them has such an option, or it cannot have such a value.
        """
        parts = {slot: getattr(self, slot) for slot in _SLOTS}
        known = sorted({name for part in parts.values() for name in _options_of(part)})
        if unknown := [name for name in options if name not in known]:
            raise ValueError(f"there is no {unknown[0]!r}; this strategy has "
                             + (f"the options {', '.join(known)}" if known else "no options of its own"))
        return dataclasses.replace(self, **{
            slot: _with(part, {name: value for name, value in options.items() if name in _options_of(part)})
            for slot, part in parts.items()})

    def with_optimizer(self, name: str | None, options: Mapping[str, float]) -> Recipe:
        """With the optimiser of a key at the server, "none", or None for the recipe's own with other options.

        Raises:
            ValueError: there is no such optimiser, it has no such option, or that cannot have such a value.
        """
        chosen = self.optimizer if name is None else None if name == "none" else registry.load(
            OPTIMIZERS, name).OPTIMIZER()
        if chosen is None and options:
            raise ValueError(f"without an optimiser at the server there is no {next(iter(options))!r}; name one with "
                             f"--server-optimizer: {', '.join(registry.keys(OPTIMIZERS))}")
        if unknown := [option for option in options if option not in _options_of(chosen)]:
            raise ValueError(f"there is no {unknown[0]!r}; {_name_of(chosen)} has the options "
                             f"{', '.join(sorted(_options_of(chosen)))}")
        return dataclasses.replace(self, optimizer=_with(chosen, options))

    def described(self) -> dict[str, object]:
        """What it is made of, for a report."""
        parts = {slot: getattr(self, slot) for slot in ("reduction", "optimizer", "refactorization", "schedule")}
        return {"family": self.family, **{slot: None if part is None else {
            "name": _name_of(part), **_options_of(part)} for slot, part in parts.items()}}


def _options_of(part: Any) -> dict[str, Any]:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) else {}  # type: ignore[arg-type]


def _name_of(part: Any) -> str:
    """The key of a part, or of one of an outside module its class's name."""
    package, _, module = type(part).__module__.rpartition(".")
    return module.replace("_", "-") if package.startswith("fedlora_strategies.") else type(part).__name__


def _with(part: Any, options: Mapping[str, float]) -> Any:
    """The part with these values: whole numbers where its own are."""
    if not options:
        return part
    now, values = _options_of(part), {}
    for name, value in options.items():
        if isinstance(now[name], int) and not float(value).is_integer():
            raise ValueError(f"{name} is {value:g}; it must be a whole number")
        values[name] = type(now[name])(value)
    return dataclasses.replace(cast(Any, part), **values)


def presets() -> dict[tuple[str, bool], Preset]:
    """(key, private) → its preset, of every recipe that is found."""
    found = {key: registry.load(RECIPES, key).RECIPE for key in registry.keys(RECIPES)}
    return {(key, private): recipe.preset(private) for private in (False, True) for key, recipe in found.items()}
