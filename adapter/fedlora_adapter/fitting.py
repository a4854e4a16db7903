"""Weights of a combination, fitted to public labelled rows.

A small search over shares that add up to 1: it begins at equal shares and at each adapter alone, and then moves shares
from one adapter to another, in steps of 0.2, 0.1 and 0.05, as long as the mean loss on the rows falls, at most ten
times at each step. What is judged is the very adapter that would be written. Private rows must not be used: the weights
depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from pathlib import Path

import torch

from fedlora import models
from fedlora.models import LoadedModel
from fedlora.task import Task
from fedlora.tasks import read
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification

from .base_weights import BaseWeights
from .combining import Way, combined, whole_tensors
from .peft_folder import TASKS, Adapter

STEPS = (0.2, 0.1, 0.05)
MOST_MOVES = 10
"""Most moves at each step."""


def fitted(adapters: Sequence[Adapter], way: Way, rows: Path, base: str, column: Mapping[str, str],
           max_length: int) -> tuple[tuple[float, ...], str]:
    """Return the weights with the lowest mean loss on public rows, and what is to be told about the search.

    Args:
        adapters: the adapters.
        way: how they are combined.
        rows: a file or folder with the rows.
        base: the base model.
        column: the rows' names of columns.
        max_length: tokens kept of a row.

    Raises:
        ValueError: the rows, the base or the adapters' task do not fit.
    """
    task_type = adapters[0].config.get("task_type")
    if task_type not in TASKS:
        raise ValueError(f"{adapters[0].path} has the task type {task_type!r}; weights can be fitted for "
                         f"{' and '.join(TASKS)}. Give the weights as numbers")
    key, labels = TASKS[task_type], adapters[0].labels or ()
    if key == "classification" and not labels:
        raise ValueError(f"{adapters[0].path} does not name its labels (base/config.json, id2label), so that labelled "
                         "rows cannot be understood. Give the weights as numbers")
    kind: type[Task] = Classification if key == "classification" else CausalLM
    found = read(rows, key, columns=column, declared=labels, held_out=True)
    kind.check_answered(found, str(rows), "--weights public:FILE")
    loaded = models.load(BaseWeights(base).path, key, labels)
    task = (Classification(loaded.tokenizer, labels, max_length) if key == "classification"
            else CausalLM(loaded.tokenizer, max_length))
    records = task.encode(found)
    tuned = _Tuned(adapters, way, loaded)
    scale = way.default_weight(len(adapters)) * len(adapters)
    tried: dict[tuple[float, ...], float] = {}

    def loss(shares: tuple[float, ...]) -> float:
        if shares not in tried:
            tuned.set(tuple(scale * share for share in shares))
            tried[shares] = task.evaluate(loaded.model, records)["loss"]
        return tried[shares]

    best = search(len(adapters), loss)
    equal = (1 / len(adapters),) * len(adapters)
    return tuple(scale * share for share in best), (
        f"{len(tried)} combinations tried on {len(records):,} public rows: loss {tried[best]:.4f}, with equal shares "
        f"{tried[equal]:.4f}, with one adapter alone {min(tried[one] for one in _alone(len(adapters))):.4f} at best")


def search(adapters: int, loss: Callable[[tuple[float, ...]], float]) -> tuple[float, ...]:
    """Return shares that add up to 1 at which the loss is lowest, by the search of the module's docstring.

    Args:
        adapters: number of shares.
        loss: what is made small; NaN counts as infinitely large.
    """

    def judged(shares: tuple[float, ...]) -> float:
        value = loss(shares)
        return value if value == value else float("inf")

    best = min([(1 / adapters,) * adapters, *_alone(adapters)], key=judged)
    for step in STEPS:
        for _ in range(MOST_MOVES):
            moves = [_moved(best, source, sink, step) for source, sink in permutations(range(adapters), 2)
                     if best[source] > 0]
            nearest = min(moves, key=judged)
            if judged(nearest) >= judged(best):
                break
            best = nearest
    return best


def _alone(adapters: int) -> list[tuple[float, ...]]:
    return [tuple(float(i == k) for i in range(adapters)) for k in range(adapters)]


def _moved(shares: tuple[float, ...], source: int, sink: int, step: float) -> tuple[float, ...]:
    moved = min(step, shares[source])
    return tuple(round(share + moved * ((i == sink) - (i == source)), 6) for i, share in enumerate(shares))


class _Tuned:
    """A model whose weights are those of the base with a combination of adapters."""

    def __init__(self, adapters: Sequence[Adapter], way: Way, loaded: LoadedModel) -> None:
        self._adapters, self._way, self._model = adapters, way, loaded.model
        self._layers = {name: self._weight(name) for name in
                        sorted(set().union(*(adapter.targets for adapter in adapters)))}
        self._base = {name: weight.detach().clone() for name, weight in self._layers.items()}

    def _weight(self, name: str) -> torch.Tensor:
        try:
            weight: torch.Tensor = self._model.get_submodule(name).weight  # type: ignore[assignment]  # a layer's
        except AttributeError:
            raise ValueError(f"--base has no layer {name}, which the adapters change: it is another model") from None
        return weight

    @torch.no_grad()
    def set(self, weights: tuple[float, ...]) -> None:
        """Set the model to the combination with these weights."""
        for name, weight in self._layers.items():
            new = combined(self._adapters, name, weights, self._way).target
            factors = new.rounded()
            update = new.scaling * (factors.B @ factors.A)
            is_turned = new.is_embedding or type(self._model.get_submodule(name)).__name__ == "Conv1D"
            weight.copy_(self._base[name] + (update.T if is_turned else update).to(weight.dtype))
        if self._adapters[0].others and sum(weights) > 0:
            parameters = dict(self._model.named_parameters())
            for key, tensor in whole_tensors(self._adapters, weights).items():
                name = key.removeprefix("base_model.model.")
                if name not in parameters or parameters[name].shape != tensor.shape:
                    raise ValueError(f"--base has no {name} of shape {tuple(tensor.shape)}, which the adapters "
                                     "replace: it is another model")
                parameters[name].copy_(tensor)
