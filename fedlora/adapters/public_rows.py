"""Starts from public rows (--init public:FILE): the file's rows, and the loss's gradient on them for each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from fedlora import data
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.start import initial_tensors
from fedlora.places import expanded
from fedlora.tasks import Records, Task, read, task_named

PREFIX = "public:"

ROWS = 512
"""Most rows that the gradient is averaged over. From a larger file, this many are drawn at random by the seed."""

_BATCH = 32


def read_public(path: str, task: str, labels: Sequence[str], *, columns: Mapping[str, str],
                others: Mapping[str, str | Path | None] | None = None, allow_download: bool = False,
                options: data.ReadOptions | None = None) -> data.Rows:
    """Read and check the public file of --init public:FILE.

    Args:
        path: file, folder or hub dataset, as for `fedlora.tasks.read`.
        task: key of the task.
        labels: the run's label set; () if it is not known yet.
        columns: the file's name for a column, where it is not the expected one.
        others: flag → path of the run's other data. The public file must not be one of them, nor contain one or lie
            inside one.
        allow_download: fetch a hub dataset that is not in the local cache.
        options: what the coordinator says about the file, such as its separator.

    Raises:
        ValueError: the file cannot be read, its labels are missing or wrong, or it is private or held-out data.
    """
    for flag, other in (others or {}).items():
        if other is not None and _overlap(expanded(path), expanded(other)):
            why = ("a start from it would release private rows without noise" if flag == "--data" else
                   "an evaluation on rows that the start was computed from means nothing")
            raise ValueError(f"--init {PREFIX}{path} is (part of) {flag} {other}: {why}. Name another file")
    rows = read(path, task, columns=columns, allow_download=allow_download, declared=labels,
                options=options)
    if task_named(task).has_labels:
        if len(data.label_names(rows)) < 2:
            found = ", ".join(data.label_names(rows)) or "none"
            raise ValueError(f"--init {PREFIX}{path} needs rows of at least two labels, and its labels are: {found}. "
                             "Fill the label column (--column label=NAME names another), or choose --init orthonormal")
        if labels:
            data.check_labels(rows, labels)
    return rows


def public_start(adapted: AdaptedModel, task: Task, rows: data.Rows, *, seed: int) -> dict[str, np.ndarray]:
    """Return the initial values of all tensors of an adapter whose bases come from public rows.

    Heads are drawn at random, as for every start.

    Args:
        adapted: the model as `attach` made it. Its values are restored afterwards.
        task: the run's task.
        rows: the public rows, as `read_public` returned them.
        seed: seed of the head, and of the choice of rows if there are more than `ROWS`.

    Raises:
        ValueError: no row can be trained on, or the gradient of a weight is zero or not finite.
    """
    if len(rows) > ROWS:
        rows = rows.take(np.sort(np.random.default_rng(seed).choice(len(rows), ROWS, replace=False)))
    records = task.encode(rows)
    if not len(records):
        raise ValueError("--init public: no row of the file has a label, or an answer within --max-length")
    before = adapted.read("state")
    adapted.write(initial_tensors(adapted, init="orthonormal", seed=seed))  # an update of 0, and the run's own head
    try:
        gradients = mean_gradients(adapted, task, records)
    finally:
        adapted.write(before)
    return initial_tensors(adapted, init="public", seed=seed, gradient=lambda site: gradients[site.name])


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
            raise ValueError(f"--init public: the gradient of {module} on the file's rows is zero or not finite; "
                             "choose --init orthonormal or weight")
        result[module] = total.T if isinstance(adapted.base_layer(module), Conv1D) else total
    return result


def _overlap(one: Path, other: Path) -> bool:
    """Return whether the two paths are the same, or one lies inside the other."""
    first, second = one.resolve(), other.resolve()
    return first == second or first in second.parents or second in first.parents
