"""Starts from a public file: its rows, the loss's gradient on them, and the inputs of each adapted layer.

The gradient (--init public:FILE, lora-ga:FILE, lora-sb:FILE) needs rows with labels or answers. The inputs (--init
eva:FILE, avoid:FILE, protect:FILE) need texts alone; labels in the file are not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora import data
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.start import TEXT, initial_tensors, start_of
from fedlora.places import expanded
from fedlora.plan import Tensors
from fedlora.tasks import Records, Task, read, task_named

ROWS = 512
"""Most rows that are used. From a larger file, this many are drawn at random by the seed."""

TOKENS = 1024
"""The number of tokens whose inputs are kept of each layer: at least one of each record, at random places in it."""

_BATCH = 32


def read_public(path: str, task: str, labels: Sequence[str], *, columns: Mapping[str, str], init: str = "public",
                others: Mapping[str, str | Path | None] | None = None, allow_download: bool = False,
                options: data.ReadOptions | None = None, option: str = "--init") -> data.Rows:
    """Read and check the file of a start.

    Args:
        path: file, folder or hub dataset, as for `fedlora.tasks.read`.
        task: key of the task.
        labels: the run's label set; () if it is not known yet.
        columns: the file's name for a column, where it is not the expected one.
        init: the start's key. If it reads texts alone, the file needs no labels, and those that it has are left out.
        others: flag → path of the run's other data. The public file must not be one of them, nor contain one or lie
            inside one.
        allow_download: fetch a hub dataset that is not in the local cache.
        options: what the coordinator says about the file, such as its separator.
        option: the option that names the file, for messages.

    Raises:
        ValueError: the file cannot be read, its labels are missing or wrong, or it is private or held-out data.
    """
    for flag, other in (others or {}).items():
        if other is not None and _overlap(expanded(path), expanded(other)):
            why = ("a start from it would release private rows without noise" if flag == "--data" else
                   "an evaluation on rows that the start was computed from means nothing")
            raise ValueError(f"{option} {init}:{path} is (part of) {flag} {other}: {why}. Name another file")
    kind = task_named(task)
    if start_of(f"{init}:{path}")[0].reads == TEXT and kind.has_labels:
        rows = read(path, task, columns=columns, allow_download=allow_download, options=options, answered=False)
        return dataclasses.replace(rows, labels=(labels[0] if labels else None,) * len(rows), otherwise=None)
    rows = read(path, task, columns=columns, allow_download=allow_download, declared=labels,
                options=options)
    if kind.has_labels:
        if len(data.label_names(rows)) < 2:
            found = ", ".join(data.label_names(rows)) or "none"
            instead = "choose --init orthonormal" if option == "--init" else f"leave {option} out"
            raise ValueError(f"{option} {init}:{path} needs rows of at least two labels, and its labels are: {found}. "
                             f"Fill the label column (--column label=NAME names another), or {instead}")
        if labels:
            data.check_labels(rows, labels)
    return rows


def some_rows(rows: data.Rows, most: int, seed: int) -> data.Rows:
    """Return the rows, or at most this many of them, drawn at random by the seed, in their order."""
    if len(rows) <= most:
        return rows
    return rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False)))


def public_start(adapted: AdaptedModel, task: Task, rows: data.Rows, *, seed: int, init: str = "public",
                 head: Tensors | None = None) -> dict[str, np.ndarray]:
    """Return the initial values of all tensors of an adapter whose bases come from a public file.

    Heads are drawn at random, as for every start, unless one is given.

    Args:
        adapted: the model as `attach` made it. Its values are restored afterwards.
        task: the run's task.
        rows: the public rows, as `read_public` returned them.
        seed: seed of the head, of what else is drawn, and of the choice of rows if there are more than `ROWS`.
        init: the start's key.
        head: the head's values that the run starts from, at which the gradient is computed; None for those drawn.

    Raises:
        ValueError: no row can be trained on, or the gradient of a weight is zero or not finite.
    """
    records, own = task.encode(some_rows(rows, ROWS, seed)), dict(head or {})
    if not len(records):
        raise ValueError(f"--init {init}: no row of the file has a label, or an answer within --max-length")
    if start_of(f"{init}:FILE")[0].reads == TEXT:
        inputs = sampled_inputs(adapted, task, records, seed)
        return initial_tensors(adapted, init=init, seed=seed, inputs=lambda site: inputs[site.name]) | own
    before = adapted.read("state")
    adapted.write(initial_tensors(adapted, init="orthonormal", seed=seed) | own)  # an update of 0, and the run's head
    try:
        gradients = mean_gradients(adapted, task, records)
    finally:
        adapted.write(before)
    return initial_tensors(adapted, init=init, seed=seed, gradient=lambda site: gradients[site.name]) | own


@torch.no_grad()
def sampled_inputs(adapted: AdaptedModel, task: Task, records: Records, seed: int) -> dict[str, torch.Tensor]:
    """Return what each adapted layer is given at some tokens of the records, by the base model.

    Args:
        adapted: the model, with an update of 0.
        task: the run's task.
        records: the records.
        seed: seed of the choice of tokens.

    Returns:
        Module name → [tokens, d_in] float32, about `TOKENS` of them, on the CPU.

    Raises:
        ValueError: the inputs of a layer are not finite.
    """
    of_each, random = -(-TOKENS // len(records)), np.random.default_rng(seed)
    kept: dict[str, list[torch.Tensor]] = {module: [] for module in adapted.layout.modules}
    places = torch.empty(0)  # [records, of_each] of the batch under way, as shares of a record's length

    def keep(module: str, lengths: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            given = inputs[0]
            if given.dim() < 3 or len(given) != len(lengths):  # a layer whose rows belong to no record by their place
                flat = given.reshape(-1, given.shape[-1])
                chosen = flat[torch.linspace(0, len(flat) - 1, min(len(flat), places.numel())).long()]
            else:
                given = given.reshape(len(given), -1, given.shape[-1])
                token = (places * lengths.clamp(max=given.shape[1])[:, None]).long()
                chosen = given[torch.arange(len(given))[:, None], token].reshape(-1, given.shape[-1])
            kept[module].append(chosen.float().cpu())
        return note

    order = np.argsort(records.lengths, kind="stable")
    for start in range(0, len(order), _BATCH):
        indices = order[start:start + _BATCH]
        lengths = torch.from_numpy(records.lengths[indices].astype(np.int64))
        places = torch.from_numpy(random.uniform(0, 1, (len(indices), of_each)))
        batch = task.collate(records, indices, int(lengths.max()), adapted.model.device)
        hooks = [adapted.base_layer(module).register_forward_pre_hook(keep(module, lengths))
                 for module in adapted.layout.modules]
        try:
            task.per_record_loss(adapted.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    found = {module: torch.cat(several) for module, several in kept.items()}
    if strange := next((module for module, inputs in found.items() if not inputs.isfinite().all()), None):
        raise ValueError(f"the inputs of {strange} on the file's texts are not finite; choose --init orthonormal or "
                         "weight")
    return found


def mean_gradients(adapted: AdaptedModel, task: Task, records: Records) -> dict[str, torch.Tensor]:
    """Return the gradient of the records' mean loss with respect to each adapted module's frozen weight.

    Returns:
        Module name → gradient, (d_out, d_in) float32.

    Raises:
        ValueError: a gradient is zero or not finite.
    """
    modules = adapted.layout.modules
    weights = [adapted.base_layer(module).weight for module in modules]
    sums = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    order = np.argsort(records.lengths, kind="stable")
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for start in range(0, len(order), _BATCH):
            indices = order[start:start + _BATCH]
            batch = task.collate(records, indices, int(records.lengths[indices].max()), weights[0].device)
            loss = task.per_record_loss(adapted.model, batch).sum() / len(records)
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += gradient.float()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    result = {}
    for module, total in zip(modules, sums, strict=True):
        if not total.isfinite().all() or not total.any():
            raise ValueError(f"--init: the gradient of {module} on the file's rows is zero or not finite; "
                             "choose --init orthonormal or weight")
        result[module] = total.T if isinstance(adapted.base_layer(module), Conv1D) else total
    return result


def _overlap(one: Path, other: Path) -> bool:
    """Return whether the two paths are the same, or one lies inside the other."""
    first, second = one.resolve(), other.resolve()
    return first == second or first in second.parents or second in first.parents
