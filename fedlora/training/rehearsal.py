"""Tests on made-up records, before a real record is read or charged, that no record affects another one's gradient.

`rehearse` tests the model: each record has its own gradient, and every trained tensor gets one.
`show_batch_invariance` tests the machine: the rounding of a record's gradient does not depend on the other records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from fedlora.adapters import AdaptedModel, not_by_record
from fedlora.models import embedded_tokens
from fedlora.plan import RunPlan
from fedlora.records import Batch
from fedlora.tasks import Records, Task
from fedlora.training.batch_invariance import Findings, Shapes, content_dependent, key_of, made_up_records, show_shapes
from fedlora.training.gradient_buffer import GradientBuffer, row_norms
from fedlora.training.sampling import lengths_up_to


class Rehearsed(Protocol):
    """The part of `fedlora.training.trainer.Trainer` that the tests here use."""

    adapted: AdaptedModel
    active: AdaptedModel
    task: Task
    buffer: GradientBuffer
    device: torch.device
    precision: str
    findings: Findings

    @property
    def compiles(self) -> bool:
        """Whether the model's blocks are compiled."""

    def ladder(self, private: bool) -> tuple[int, ...]:
        """Return the lengths to which records are padded."""

    def private_rows(self, length: int, most_of_a_draw: int) -> int:
        """Return the number of rows to try first for private micro-batches of a padded length."""

    def fill_buffer(self, records: Records, indices: np.ndarray, length: int) -> torch.Tensor:
        """Leave the gradient of each record in the buffer, and return [records] losses."""

    def one_pass(self, batch: Batch, weights: torch.Tensor | None) -> torch.Tensor:
        """Run the backward pass of the sum of the losses, weighted if there are weights; return [records] losses."""


_APART = {"fp32": 1e-3, "bf16": 0.3}
"""Precision → the largest allowed change of a record's gradient, relative to its norm, when the padding or the other
records change."""


def rehearse(trainer: Rehearsed) -> None:
    """Test on made-up records that each has its own gradient, and that the gradient reaches every trained tensor.

    Raises:
        ValueError: Gradients are not finite, do not reach a tensor, or depend on other records or on the padding.
    """
    length = max(2, min(8, trainer.task.max_length))
    records = _made_up(trainer, [length, length])

    def gradients(indices: np.ndarray, length: int) -> torch.Tensor:
        trainer.fill_buffer(records, indices, length)
        return trainer.buffer.rows.clone()

    with _random_tensors(trainer), _naming_layers(trainer):
        together = gradients(np.arange(3), length)
        alone = torch.cat([gradients(np.array([i]), length) for i in range(3)])
        unpadded = torch.cat([gradients(np.array([i]), int(records.lengths[i])) for i in range(3)])
    if not bool(together.isfinite().all()):
        raise ValueError("the model's gradients on made-up records are not finite; choose another --model, or "
                         "--precision fp32")
    slots = trainer.buffer.slots
    cut_off = sum(not bool(together[:, slot.columns].any()) for slot in slots)
    if cut_off:
        raise ValueError(f"{cut_off} of the {len(slots)} tensors to be trained have no influence on the loss, and "
                         "would be trained on noise alone; choose other --targets")
    most = _APART[trainer.precision] * row_norms(alone)
    if not bool((row_norms(together - alone) <= most).all()):
        raise ValueError("the model mixes the records of a batch: the gradient of one depends on the others, so that "
                         "clipping would not protect it. Choose other --targets, or another --model")
    if not bool((row_norms(unpadded - alone) <= most).all()):
        raise ValueError("the model treats padding as text: a record's gradient depends on how far it is padded. "
                         "Choose other --targets, or another --model")


@torch.no_grad()
def padding_counts(adapted: AdaptedModel, task: Task) -> bool:
    """Return whether the loss of a made-up record depends on how far it is padded.

    If it does, so do all the model's predictions.
    """
    length = max(2, min(8, task.max_length))
    records = made_up_records(task, _embedded(adapted, task), [length])
    losses = [float(task.per_record_loss(adapted.model, task.collate(records, np.array([1]), padded)))
              for padded in (int(records.lengths[1]), length)]
    return abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1])


@contextlib.contextmanager
def _naming_layers(trainer: Rehearsed) -> Iterator[None]:
    """Turn an error in a layer whose inputs are not separate for each record into one that names such layers."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        trainer.buffer.disarm()
        strange = not_by_record(trainer.adapted.model, [site.name for site in trainer.adapted.layout.sites])
        if not strange:
            raise
        name, given = next(iter(strange.items()))
        raise ValueError(f"{len(strange)} of the {len(trainer.adapted.layout.sites)} target layers cannot be trained "
                         f"under privacy, because their inputs are not separate for each record: {name} {given}. "
                         "Choose other --targets; --targets all leaves such layers out") from error


def show_batch_invariance(trainer: Rehearsed, run: RunPlan, most_of_a_draw: int) -> Shapes:
    """Find the shapes of private micro-batches, and test that they are batch-invariant on this machine.

    Shapes that were found before under the same conditions are not tested again; then only the largest one is computed,
    so that a lack of memory shows now.

    Args:
        trainer: The trainer.
        run: The plan that will be trained.
        most_of_a_draw: The usual number of records in a draw, rounded up. More rows would mostly be fillers.

    Raises:
        ValueError: This machine does not compute the same gradient twice.
    """
    lengths = lengths_up_to(trainer.task.max_length, trainer.ladder(private=True))
    one_at_a_time = content_dependent(trainer.adapted.model)
    first = {length: 1 if one_at_a_time else trainer.private_rows(length, most_of_a_draw) for length in lengths}
    key = key_of(run, trainer.adapted.model, first, device=trainer.device, precision=trainer.precision,
                 compiled=trainer.compiles, trained=[spec.name for spec in trainer.active.layout.trained],
                 ranks={active.name: active.rank for active, whole in zip(
                     trainer.active.layout.sites, trainer.adapted.layout.sites, strict=True)
                     if active.rank != whole.rank})
    shapes, records = trainer.findings.get(key), _made_up(trainer, lengths)

    def filled_up(records: Records, indices: np.ndarray, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ([rows, values] gradients, [rows] losses) of these records and filler rows after them."""
        trainer.buffer.arm(rows)
        losses = trainer.one_pass(trainer.task.collate(records, indices, length, rows=rows), None)
        trainer.buffer.check_complete()
        return trainer.buffer.computed, losses

    with _random_tensors(trainer):
        if shapes is None or sorted(shapes.rows) != lengths:
            shapes = show_shapes(filled_up, records, first, one_at_a_time)
            trainer.findings.put(key, shapes)
        else:
            largest = max(lengths, key=lambda length: length * shapes.rows[length])
            filled_up(records, np.array([2 * lengths.index(largest)]), largest, shapes.rows[largest])
    return shapes


def _made_up(trainer: Rehearsed, lengths: Sequence[int]) -> Records:
    return made_up_records(trainer.task, _embedded(trainer.adapted, trainer.task), lengths)


def _embedded(adapted: AdaptedModel, task: Task) -> int:
    embedded = embedded_tokens(adapted.model)
    return len(task.tokenizer) if embedded is None else embedded


@contextlib.contextmanager
def _random_tensors(trainer: Rehearsed) -> Iterator[None]:
    """Let the model hold random tensors for a while.

    With zeros, as in a fresh adapter, the rounding of a record would not show in all of its gradient.
    """
    adapted = trainer.active
    random, before = np.random.default_rng(0), adapted.read("state")
    adapted.write({name: (0.1 * random.standard_normal(array.shape)).astype(np.float32)
                   for name, array in before.items()})
    try:
        yield
    finally:
        trainer.buffer.disarm()
        adapted.write(before)
