"""Recipes: a strategy's composition of an adapter family, a start, the parts of the server step, and default values.

There is one file of `recipes/` for each paper. The presets' values were found on the demo's made-up notes and on public
text (SST-2), never on a user's data. Each recipe has its own learning rate, because an orthonormal A makes the
effective step about three times as long as a Kaiming A does (row norm ≈ 1/√3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fedlora import registry
from fedlora.adapters import AdapterLayout
from fedlora.adapters.family import FAMILIES
from fedlora.plan.usual import ONE_STEP, USUAL

from .reductions import FactorReduction, Reduction
from .reductions.mean import Mean
from .refactorizations import Refactorization
from .schedules import Schedule
from .schedules.constant import Constant
from .server_optimizers import ServerOptimizer
from .server_optimizers.adam import Adam
from .stack import Stacking
from .step import ServerStep

RECIPES, OPTIMIZERS = "fedlora_strategies.recipes", "fedlora_strategies.server_optimizers"
REDUCTIONS, SCHEDULES = "fedlora_strategies.reductions", "fedlora_strategies.schedules"

STEPS_AT_SERVER = Adam(lr=0.005, decay=1.0, beta1=0.0, tau=1e-8, correct_bias=1)
"""The server optimizer of runs with one local step a round.

It was found on public text (SST-2) with FedAvg-LoRA, and serves local and central noise alike. It keeps its second
moments from round to round, where a fresh AdamW at the clients steps by the sign of the gradient alone; and no first
moment was better than one."""

_SLOTS = ("reduction", "refactorization", "schedule")
"""The parts whose options are set by --strategy-options. The server optimizer's options are given separately, and so
are those of a reduction that takes the place of the recipe's own."""


@dataclass(frozen=True)
class Preset:
    """The default values of a recipe's runs, with or without privacy.

    The values are those of `RunPlan`, with two differences. `batch_size` is called `expected_batch` there. `init` is
    the start of the adapters, as for --init; "" stands for the recipe's start.
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
        """Return the preset of runs without privacy.

        It adapts all linear layers, where private runs adapt only query and value: without noise, more trained values
        cost nothing but bytes.
        """
        usual = USUAL[False]
        return cls(rank, alpha, "adamw", lr, local_steps=usual.local_steps, batch_size=usual.expected_batch,
                   clip_norm=1.0, head_scale=1.0, rounds=usual.rounds, lr_schedule="linear", targets=("all",))

    @classmethod
    def private(cls, rank: int, alpha: float, lr: float, *, clip_norm: float, head_scale: float) -> Preset:
        """Return the preset of private runs.

        The clip norm is chosen for the middle of a run, not for its start. The adapters' gradients are tiny until the
        head has grown. Later, misclassified records have the longest gradients, and clipping all records to one length
        would reverse the direction of the mean.
        """
        usual = USUAL[True]
        return cls(rank, alpha, "adamw", lr, local_steps=usual.local_steps, batch_size=usual.expected_batch,
                   clip_norm=clip_norm, head_scale=head_scale, rounds=usual.rounds, lr_schedule="linear",
                   targets=("auto",))

    def in_one_step(self) -> Preset:
        """Return the preset of runs with one local step a round: the client's gradient goes to the server's optimizer.

        At a rate of 1, the mean change of the clients' tensors is the mean gradient itself.
        """
        return dataclasses.replace(self, optimizer="sgd", lr=1.0, lr_schedule="constant", rounds=ONE_STEP.rounds,
                                   local_steps=ONE_STEP.local_steps, batch_size=ONE_STEP.expected_batch)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The composition of a strategy.

    Attributes:
        family: The key of the adapter family (`fedlora.adapters.families`), which decides what is trained, frozen and
            sent.
        start: The key of the adapters' start, as for --init.
        reduction: Combines the uploads of a round.
        optimizer: The server optimizer, or None.
        refactorization: Rewrites the factors between rounds, or None.
        schedule: Says what trains in which round.
        private: The default values of private runs.
        open: The default values of runs without privacy.
        presets_of: Start → the key of the recipe whose default values apply with this start, in place of these.
        one_step: Whether clients do one step a round (`in_one_step`). The default values are then those of private
            runs, with privacy or without.
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
    one_step: bool = False

    def in_one_step(self) -> Recipe:
        """Return the recipe for runs with one local step a round, after which the server's optimizer steps."""
        return dataclasses.replace(self, optimizer=STEPS_AT_SERVER, one_step=True)

    def preset(self, private: bool, start: str | None = None) -> Preset:
        """Return the default values.

        Args:
            private: Whether the run is private.
            start: The start that the user named, if any.
        """
        if start is not None and start in self.presets_of:
            other: Recipe = registry.load(RECIPES, self.presets_of[start]).RECIPE
            return (other.in_one_step() if self.one_step else other).preset(private)
        chosen = self.private.in_one_step() if self.one_step else self.private if private else self.open
        return dataclasses.replace(chosen, init=chosen.init or self.start)

    def family_options(self, rank: int, rounds: int) -> tuple[tuple[str, float], ...]:
        """Return (name, value) of the family's options that the server step asks for, as in a plan.

        Args:
            rank: The largest rank of a layer.
            rounds: The number of planned rounds.
        """
        family = registry.load(FAMILIES, self.family).FAMILY
        if "slots" not in {option.name for option in dataclasses.fields(family)}:
            return ()
        parts: tuple[object, ...] = (self.reduction, self.refactorization)
        needed = [part.slots(rank, rounds) for part in parts if isinstance(part, Stacking)]
        return (("slots", float(max([1, *needed]))),)

    def check_linear(self) -> None:
        """Check that the server step needs only the sum of the uploads, which is all that secure aggregation gives it.

        Raises:
            ValueError: The reduction needs more.
        """
        if self.reduction.linear:
            return
        needs = ("each client's own factors A and B. Choose a strategy that averages what is sent, such as fedsvd or "
                 "fedavg-lora" if isinstance(self.reduction, FactorReduction) else
                 "each upload by itself. Choose --reduction mean")
        raise ValueError("secure aggregation shows the server the sum of the clients' gradients alone, and its "
                         f"reduction {_name_of(self.reduction)} needs {needs}")

    def step(self, layout: AdapterLayout, rounds: int, seed: int) -> ServerStep:
        """Return the server step of a run.

        Args:
            layout: The adapters' tensors.
            rounds: The number of planned rounds.
            seed: The seed of the random numbers that the refactorization and the schedule draw.

        Raises:
            ValueError: The step cannot work with adapters of this layout.
        """
        return ServerStep(layout, self.reduction, self.optimizer, self.refactorization, self.schedule, rounds, seed)

    def with_options(self, options: Mapping[str, float]) -> Recipe:
        """Return the recipe with other values for options of the reduction, the refactorization or the schedule.

        Args:
            options: Option → value.

        Raises:
            ValueError: None of the parts has such an option, or the value is not allowed.
        """
        parts = {slot: getattr(self, slot) for slot in _SLOTS}
        known = sorted({name for part in parts.values() for name in _options_of(part)})
        if unknown := [name for name in options if name not in known]:
            raise ValueError(f"there is no option {unknown[0]!r}; this strategy has "
                             + (f"the options {', '.join(known)}" if known else "no options of its own"))
        return dataclasses.replace(self, **{
            slot: _with(part, {name: value for name, value in options.items() if name in _options_of(part)})
            for slot, part in parts.items()})

    def with_reduction(self, name: str | None, options: Mapping[str, float]) -> Recipe:
        """Return the recipe with another reduction, or with other options for its own.

        Args:
            name: The reduction's key; None keeps the recipe's own.
            options: Option → value.

        Raises:
            ValueError: There is no such reduction, it has no such option, or the value is not allowed.
        """
        chosen = self.reduction if name is None else registry.load(REDUCTIONS, name).REDUCTION()
        known = ", ".join(sorted(_options_of(chosen)))
        if unknown := [option for option in options if option not in _options_of(chosen)]:
            raise ValueError(f"there is no option {unknown[0]!r}; {_name_of(chosen)} has "
                             + (f"the options {known}" if known else "no options"))
        return dataclasses.replace(self, reduction=_with(chosen, options))

    def with_optimizer(self, name: str | None, options: Mapping[str, float]) -> Recipe:
        """Return the recipe with another server optimizer, or with other options for its own.

        Args:
            name: The optimizer's key, or "none"; None keeps the recipe's own.
            options: Option → value.

        Raises:
            ValueError: There is no such optimizer, it has no such option, or the value is not allowed.
        """
        chosen = self.optimizer if name is None else None if name == "none" else registry.load(
            OPTIMIZERS, name).OPTIMIZER()
        if chosen is None and options:
            raise ValueError(f"there is no option {next(iter(options))!r}, because this run has no server optimizer; "
                             f"choose one with --server-optimizer: {', '.join(registry.keys(OPTIMIZERS))}")
        if unknown := [option for option in options if option not in _options_of(chosen)]:
            raise ValueError(f"there is no option {unknown[0]!r}; {_name_of(chosen)} has the options "
                             f"{', '.join(sorted(_options_of(chosen)))}")
        return dataclasses.replace(self, optimizer=_with(chosen, options))

    def with_ranks(self, given: str, rounds: int) -> Recipe:
        """Return the recipe with a schedule that changes the adapters' ranks from round to round.

        Args:
            given: The schedule, as --ranks takes it: its key, and its total after a colon if it takes one.
            rounds: The number of planned rounds. Decisions fall after a quarter and after half of them.

        Raises:
            ValueError: The recipe has a schedule of its own.
        """
        if type(self.schedule) is not Constant:
            raise ValueError(f"this strategy's rounds follow a schedule of its own, {_name_of(self.schedule)}; choose "
                             "ffa-lora or fedavg-lora, or leave --ranks out")
        key, _, total = given.partition(":")
        kind = registry.load(SCHEDULES, key).SCHEDULE
        chosen = kind(int(total), max(1, rounds // 4), max(1, rounds // 2)) if total else kind()
        return dataclasses.replace(self, schedule=chosen)

    def described(self) -> dict[str, object]:
        """Return the recipe's composition, for a report."""
        parts = {slot: getattr(self, slot) for slot in ("reduction", "optimizer", "refactorization", "schedule")}
        return {"family": self.family, **{slot: None if part is None else {
            "name": _name_of(part), **_options_of(part)} for slot, part in parts.items()}}


def _options_of(part: Any) -> dict[str, Any]:
    return dataclasses.asdict(part) if dataclasses.is_dataclass(part) else {}  # type: ignore[arg-type]


def _name_of(part: Any) -> str:
    """Return the key of a part; for a part from a module outside of FedLoRA, the name of its class."""
    package, _, module = type(part).__module__.rpartition(".")
    return module.lstrip("_").replace("_", "-") if package.startswith("fedlora_strategies.") else type(part).__name__


def _with(part: Any, options: Mapping[str, float]) -> Any:
    """Return the part with these values for its options.

    Raises:
        ValueError: An option that takes whole numbers is given another value.
    """
    if not options:
        return part
    now, values = _options_of(part), {}
    for name, value in options.items():
        if isinstance(now[name], int) and not float(value).is_integer():
            raise ValueError(f"{name} is {value:g}; it must be a whole number")
        values[name] = type(now[name])(value)
    return dataclasses.replace(cast(Any, part), **values)


def presets(*, one_step: bool = False) -> dict[tuple[str, bool], Preset]:
    """Return (key, private) → preset, for every recipe that is installed.

    Args:
        one_step: Whether the presets are those of runs with one local step a round.
    """
    found: dict[str, Recipe] = {key: registry.load(RECIPES, key).RECIPE for key in registry.keys(RECIPES)}
    if one_step:
        found = {key: recipe.in_one_step() for key, recipe in found.items()}
    return {(key, private): recipe.preset(private) for private in (False, True) for key, recipe in found.items()}
