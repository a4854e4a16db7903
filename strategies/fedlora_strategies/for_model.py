"""Everything that a ServerApp needs, made from a base model: the plan, the adapters, the strategy, the first state.

Within a ServerApp, with its `grid`:

    ready = FedSVD.for_model("minilm", labels=("no", "yes"), rank=8)
    result = ready.strategy.start(grid, ready.arrays, num_rounds=ready.strategy.plan.rounds)
    ready.export(result.arrays, Path("adapter"))
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from flwr.app import ArrayRecord
from transformers.modeling_utils import PreTrainedModel

import fedlora
from fedlora import models
from fedlora.adapters import (
    AdaptedModel,
    AdapterLayout,
    all_targets,
    attach_planned,
    automatic_targets,
    hand_on,
    initial_tensors,
    start_of,
)
from fedlora.models import LoadedModel
from fedlora.plan import ModelRef, RunPlan, Tensors

from .messages import to_record, to_tensors
from .recipe import RECIPES, Preset, Recipe
from .step import kept_ranks

log = logging.getLogger(__name__)


class FromRecipe(Protocol):
    """The part of `fedlora_strategies.base.FederatedLoRA` that this file uses."""

    recipe: ClassVar[Recipe]
    plan: RunPlan
    memory: Tensors

    def __init__(self, plan: RunPlan, layout: AdapterLayout, *, min_nodes: int = 1, recipe: Recipe | None = None,
                 seed: int = 0) -> None: ...


S = TypeVar("S", bound=FromRecipe)


@dataclass(frozen=True)
class Ready(Generic[S]):
    """A run that is ready to start.

    Attributes:
        strategy: The strategy.
        adapted: The base model with its adapters, for evaluation.
        state: Every tensor that is not in the base checkpoint, with the values that round 1 starts from.
    """

    strategy: S
    adapted: AdaptedModel
    state: Tensors

    @property
    def arrays(self) -> ArrayRecord:
        """The state in the form that `strategy.start` takes."""
        return to_record(self.state)

    def export(self, arrays: ArrayRecord, out_dir: Path) -> Path:
        """Write a trained state as a PEFT adapter, or in our own form if PEFT cannot hold one of its family.

        Args:
            arrays: The state, for example `strategy.start(…).arrays`.
            out_dir: The folder to write to.

        Returns:
            The folder with the adapter, from `fedlora.adapters.hand_on`.
        """
        plan = self.strategy.plan
        return hand_on(self.adapted, to_tensors(arrays), out_dir, models.base_name(plan.model),
                       max_length=plan.max_length, prefixes=kept_ranks(self.adapted.layout, self.strategy.memory))


def ready(strategy: type[S], model: str, *, labels: Sequence[str] = (), private: bool = False,
          seed: int = 0, run_id: str | None = None, min_nodes: int = 1, max_length: int = 128,
          allow_download: bool = False, **values: Any) -> Ready[S]:
    """Load a base model, attach the adapters and draw the tensors that round 1 starts from.

    Args:
        strategy: The strategy's class.
        model: The base model, as for --model.
        labels: The labels of a classifier; () for a language model.
        private: Whether clients must train under differential privacy.
        seed: The seed of the start.
        run_id: 16 hexadecimal digits; None draws them.
        min_nodes: Round 1 waits for this many nodes.
        max_length: The most tokens of a record.
        allow_download: Whether the model may be downloaded.
        **values: Values that replace the preset's, by the names of `Preset`: rank=8, rounds=3, init="weight".

    Raises:
        ValueError: The model cannot be found, or a value is unknown or does not fit the model.
    """
    recipe, task = strategy.recipe, "classification" if labels else "causal-lm"
    chosen = recipe.preset(private, values.get("init"))
    if unknown := values.keys() - {field.name for field in dataclasses.fields(Preset)}:
        raise ValueError(f"{sorted(unknown)[0]!r} is no value of a preset; choose from "
                         f"{', '.join(field.name for field in dataclasses.fields(Preset))}")
    chosen = dataclasses.replace(chosen, **values)
    reads = start_of(chosen.init)[0].reads
    if reads not in ("nothing", "weights"):
        raise ValueError(f"init is {chosen.init!r}, a start from {reads}, which only fedlora-server can make. Choose "
                         "orthonormal, weight or kaiming here")
    path = models.resolve(model, allow_download=allow_download)
    models.check_task(path, task, max_length)
    loaded = models.load(path, task, labels)
    if loaded.said:
        log.warning("%s", loaded.said)
    plan = plan_of(_name(strategy), recipe.family, chosen, models.reference(model, path), loaded,
                   run_id=run_id or secrets.token_hex(8), labels=tuple(labels), private=private, max_length=max_length,
                   train_head=bool(labels), family_options=recipe.family_options(chosen.rank, chosen.rounds))
    adapted = attach_planned(loaded, plan)
    return Ready(strategy(plan, adapted.layout, seed=seed, min_nodes=min_nodes), adapted,
                 initial_tensors(adapted, init=chosen.init, seed=seed))


def _name(strategy: type) -> str:
    """Return the key of a strategy of `recipes/`; for any other class, the class's name."""
    package, _, module = strategy.__module__.rpartition(".")
    return module.replace("_", "-") if package == RECIPES else strategy.__name__


def plan_of(strategy: str, family: str, values: Preset, reference: ModelRef, loaded: LoadedModel, *, private: bool,
            **others: Any) -> RunPlan:
    """Return the plan of a run.

    Args:
        strategy: The strategy's name.
        family: The key of the adapter family.
        values: The preset. Its values have the same names in the plan, except for `batch_size`: `expected_batch` there.
        reference: The base model's reference.
        loaded: The loaded base model, in which the targets are looked up.
        private: Whether clients must train under differential privacy.
        **others: Fields of `RunPlan` that are not in a preset, or that replace those made here.
    """
    named: Mapping[tuple[str, ...], Callable[[PreTrainedModel], tuple[str, ...]]] = {
        ("auto",): automatic_targets, ("all",): partial(all_targets, private=private), ("none",): lambda model: ()}
    fields = {field.name for field in dataclasses.fields(RunPlan)}
    made = {name: value for name, value in dataclasses.asdict(values).items() if name in fields}
    made |= {
        "fedlora_version": fedlora.__version__, "strategy": strategy, "family": family, "private": private,
        "model": reference, "task": loaded.task, "expected_batch": values.batch_size, "adapter_scale": 1.0,
        "targets": named[values.targets](loaded.model) if values.targets in named else values.targets,
        "dropout": 0.0, "max_participations": values.rounds, "weight_by_examples": not private}
    return RunPlan(**made | others)
