"""What a task is to the trainer: rows to records, a loss per record, and an evaluation."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedlora.data import Rows
from fedlora.tasks.records import Batch, Records, collate

_CHUNK = 1024
"""Rows tokenised at once."""

_EVALUATION_BATCH = 64
_EVALUATION_BUCKET = 8


class Task(ABC):
    """Holds a tokenizer and the plan's part that says what a record is.

    Attributes:
        name: as in `fedlora.plan.TASKS`.
        max_length: tokens kept of a record.
    """

    name: str

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set one, like tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @abstractmethod
    def encode(self, rows: Rows) -> Records:
        """Tokenise rows; those that cannot be trained on are left out and counted."""

    @abstractmethod
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[records] float32: each record's loss, which depends on no other record."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """For evaluation: per-record values to be summed; "loss" and "count" are among them."""

    @abstractmethod
    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """The evaluation's figures from the sums of `measure`."""

    def collate(self, records: Records, indices: np.ndarray, length: int, device: str | torch.device = "cpu") -> Batch:
        """See `fedlora.tasks.records.collate`."""
        return collate(records, indices, length, device)

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, records: Records, *, micro_batch: int | None = None,
                 device: str | torch.device = "cpu", autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """Figures over all records, in evaluation mode; the model's mode is as before afterwards.

        Raises:
            ValueError: there are no records.
        """
        if not len(records):
            raise ValueError("there is nothing to evaluate on: no row has a label or an answer within --max-length")
        training = model.training
        model.eval()
        autocast = (contextlib.nullcontext() if autocast_dtype is None
                    else torch.autocast(torch.device(device).type, dtype=autocast_dtype))
        sums: dict[str, float] = {}
        try:
            for length, indices in _by_length(records.lengths, micro_batch or _EVALUATION_BATCH, self.max_length):
                batch = self.collate(records, indices, length, device)
                with autocast:
                    measured = self.measure(model, batch)
                for name, values in measured.items():
                    sums[name] = sums.get(name, 0.0) + float(values.cpu().double().sum())
        finally:
            model.train(training)
        return self.summarize(sums)

    def _chunks(self, rows: Rows) -> Iterator[range]:
        for start in range(0, len(rows), _CHUNK):
            yield range(start, min(start + _CHUNK, len(rows)))


def _by_length(lengths: np.ndarray, micro_batch: int, max_length: int) -> Iterator[tuple[int, np.ndarray]]:
    """(padded length, indices) of batches of like length."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), micro_batch):
        indices = order[start:start + micro_batch]
        longest = int(lengths[indices].max())
        yield max(longest, min(-(-longest // _EVALUATION_BUCKET) * _EVALUATION_BUCKET, max_length)), indices
