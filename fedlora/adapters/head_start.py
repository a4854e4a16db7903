"""The start of a classifier's head from a public file: a regression on the base model's features, at the server.

A head that is drawn at random has to grow under noise before the adapters get much of a gradient. Public rows can do
that growing beforehand. The base model computes what its final linear layer is given for each row, once. Weight W and
bias b of that layer then minimise

    Σ_i loss_i(W φ_i + b) / n + (|W|² + |b|²) / 2n

over the n rows, with the task's own loss, from 0. For classification that is the logistic regression with the usual
penalty. Nothing of it depends on a private row.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedlora import data
from fedlora.adapters.attach import AdaptedModel
from fedlora.adapters.public_rows import some_rows
from fedlora.adapters.start import float32
from fedlora.plan import Tensors
from fedlora.records import Batch
from fedlora.tasks import Task

ROWS = 1024
"""Most rows that are used. From a larger file, this many are drawn at random by the seed."""

ITERATIONS = 200
"""Most iterations of L-BFGS. Each evaluates the loss on the stored features alone."""

_BATCH = 32


class _Outputs(nn.Module):
    """A stand-in for the model, whose outputs are computed from the features of the batch under way."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = torch.empty(0)

    @override
    def forward(self, *args: Any, **inputs: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.outputs)


def check_rows(rows: data.Rows, labels: Sequence[str], option: str) -> None:
    """Check that the rows say something of every label.

    Args:
        rows: the public rows.
        labels: the run's label set; () for tasks without labels, or if it is not known yet.
        option: the option and its value, for the message.

    Raises:
        ValueError: there is no row of some label.
    """
    if lacking := sorted(set(labels) - set(data.label_names(rows))):
        raise ValueError(f"{option} has no row with the label {', '.join(lacking)}, so that the head would start "
                         "against it. Name a file with rows of every label, or leave the option out")


def head_start(adapted: AdaptedModel, task: Task, rows: data.Rows, state: Tensors, *,
               seed: int) -> dict[str, np.ndarray]:
    """Return the initial values of the head's final linear layer, float32, by the names of the layout.

    Args:
        adapted: the model as `attach` made it. Its values are restored afterwards.
        task: the run's task.
        rows: the public rows.
        state: the values that the run starts from otherwise. Their update is 0.
        seed: seed of the choice of rows if there are more than `ROWS`.

    Raises:
        ValueError: no row can be used, or the base model's features are not finite.
    """
    assert adapted.head is not None, "options are checked to be for a task with a head"
    records = task.encode(some_rows(rows, ROWS, seed))
    if not len(records):
        raise ValueError("--init-head: no row of the file has a label; name another file")
    head, before = adapted.model.get_submodule(adapted.head), adapted.read("state")
    assert isinstance(head, nn.Linear), "a task's head is a linear layer"
    adapted.write(state)
    adapted.model.set_submodule(adapted.head, nn.Identity())  # so that the model's outputs are the head's inputs
    known: list[tuple[Batch, torch.Tensor]] = []
    order = np.argsort(records.lengths, kind="stable")
    try:
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                indices = order[start:start + _BATCH]
                batch = task.collate(records, indices, int(records.lengths[indices].max()), adapted.model.device)
                known.append((batch, adapted.model(**batch.inputs()).logits.double()))
    finally:
        adapted.model.set_submodule(adapted.head, head)
        adapted.write(before)
    if not all(features.isfinite().all() for _, features in known):
        raise ValueError("--init-head: the base model's features of the file's rows are not finite; leave the option "
                         "out")
    values = {name: torch.zeros_like(parameter, dtype=torch.float64, requires_grad=True)
              for name, parameter in head.named_parameters()}
    _minimise(task, known, values, len(records))
    return {f"head.{adapted.head}.{name}": float32(value.detach()) for name, value in values.items()}


def _minimise(task: Task, known: Sequence[tuple[Batch, torch.Tensor]], values: dict[str, torch.Tensor],
              count: int) -> None:
    """Fit the head's values, in place, to features that do not change.

    Args:
        task: gives the loss of each record.
        known: each batch with its features, [records, …, width] float64.
        values: "weight" and, if the layer has one, "bias".
        count: n, the number of records.
    """
    stand_in, parameters = _Outputs(), list(values.values())
    optimizer = torch.optim.LBFGS(parameters, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        total = torch.stack([value.square().sum() for value in parameters]).sum() / 2
        for batch, features in known:
            stand_in.outputs = nn.functional.linear(features, values["weight"], values.get("bias"))
            total = total + task.per_record_loss(stand_in, batch).double().sum()
        (total / count).backward()  # type: ignore[no-untyped-call]
        return (total / count).detach()

    optimizer.step(objective)  # type: ignore[no-untyped-call]
