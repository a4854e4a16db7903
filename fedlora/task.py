"""What a task is to all others: columns to rows to records, a model, a loss per record, and an evaluation.

Each file of `fedlora.tasks` is one, and says `TASK = ` its class. What the class says of itself needs neither tokenizer
nor model: the options, the plan and the files of rows are held against it.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from torch import nn

from fedlora.data import RowFormat, Rows
from fedlora.memory import memory_advice
from fedlora.plan import RunPlan
from fedlora.records import Batch, Records, collate

_CHUNK = 1024
"""Rows tokenised at once."""

_EVALUATION_BATCH = 64
_EVALUATION_TOKENS = 8192
"""Of a batch in evaluation: most records, and padded tokens."""

_OUTPUTS = 2**26
"""Most values that the model gives for a batch, but for that of a single record: a vocabulary's are many."""

_EVALUATION_BUCKET = 8

Encoded = TypeVar("Encoded")


class Task(ABC):
    """Holds a tokenizer and the plan's part that says what a record is.

    Class attributes:
        name: its key, that of the file.
        model_is: what is trained, in words: "a causal language model".
        has_labels: whether its answers are names of classes, so that a run has a label set.
        has_head: whether the model ends in a layer that a base checkpoint may lack, and that can be trained too.
        rows: what the files of rows hold.
        auto_class: transformers' class that loads a model for it.
        model_types: of config.json, for which that class has a model.
        metric: the measured figure that runs are compared by.
        peft_type: of the exported adapter.
    The first four are literals: a plan's checks read them from the file (`fedlora.plan.task_facts`).

    Attributes:
        max_length: tokens kept of a record.
    """

    name: ClassVar[str]
    model_is: ClassVar[str]
    has_labels: ClassVar[bool]
    has_head: ClassVar[bool]
    rows: ClassVar[RowFormat]
    auto_class: ClassVar[Any]
    model_types: ClassVar[Collection[str]]
    metric: ClassVar[str]
    peft_type: ClassVar[str]

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set one, like tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def of(cls, run: RunPlan, tokenizer: Any) -> Self:
        """The task of a plan."""
        return cls(tokenizer, run.max_length)

    @classmethod
    def check_answered(cls, rows: Rows, file: str, wanted_for: str) -> None:
        """Raises ValueError, naming the file and what needs them, where no row has the answer that it should have."""
        if cls.rows.answer is not None and not any(answer is not None for answer in rows.answers or ()):
            column = cls.rows.answer.column
            raise ValueError(f"{file} has no {column}s; {wanted_for} needs a {column} column (--column {column}=NAME "
                             "names another)")

    @classmethod
    def why_not(cls, model_type: str, *, encoder: bool) -> str:
        """Why a base model cannot do the task, and what to choose; "" where it is not known to be unable.

        Args:
            model_type: of its config.json.
            encoder: whether it was made to fill gaps in texts.
        """
        return ""

    @classmethod
    def model_options(cls, labels: int) -> Mapping[str, Any]:
        """What the model's configuration is to say.

        Args:
            labels: how many the run's label set has.
        """
        return {}

    @classmethod
    def head(cls, model: nn.Module) -> str | None:
        """The final linear module of the task's head: the last one that has the model's outputs. None without a head.

        Raises:
            ValueError: there is no such module.
        """
        if not cls.has_head:
            return None
        outputs: int = model.config.num_labels  # type: ignore[union-attr, assignment]
        names = [name for name, module in model.named_modules()
                 if isinstance(module, nn.Linear) and module.out_features == outputs]
        if not names:
            raise ValueError(f"{type(model).__name__} has no final linear layer with {outputs} outputs; choose another "
                             "model")
        return names[-1]

    @abstractmethod
    def encode(self, rows: Rows, unusable: Counter[str] | None = None) -> Records:
        """Tokenise rows; those that cannot be trained on are left out and counted.

        Args:
            unusable: takes the number of rows left out, by kind, and with it no row is an error: for private training,
                where each is the null record, and an answer that one of them decides would tell of it.

        Raises:
            ValueError: without `unusable`, for a row that its owner should correct; with file and line.
        """

    @abstractmethod
    def made_up(self, tokens: Sequence[Sequence[int]]) -> Records:
        """A record of each of these texts' tokens, on which a model is tried before a real one is read."""

    @abstractmethod
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """[records] float32: each record's loss, which depends on no other record."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """For evaluation: per-record values to be summed; "loss" and "count" are among them."""

    @abstractmethod
    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """The evaluation's figures from the sums of `measure`: `metric`, "loss" and "count" among them."""

    def collate(self, records: Records, indices: np.ndarray, length: int, device: str | torch.device = "cpu", *,
                rows: int | None = None) -> Batch:
        """See `fedlora.records.collate`; further rows consist of the first ordinary token."""
        return collate(records, indices, length, device, rows=rows, filler=self.filler)

    @functools.cached_property
    def filler(self) -> int:
        """The first token that has no special meaning."""
        special = set(self.tokenizer.all_special_ids)
        return next(token for token in range(len(self.tokenizer)) if token not in special)

    @property
    def outputs_per_token(self) -> int:
        """About how many values the model gives for a token."""
        return 1

    @property
    def most_tokens(self) -> int:
        """Of a batch, padded, so that what the model gives for them fits into memory."""
        return max(1, _OUTPUTS // self.outputs_per_token)

    @memory_advice("evaluation", "lower --max-length, choose a smaller --model, or leave out --eval-data")
    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module, records: Records, *, micro_batch: int | None = None,
                 device: str | torch.device = "cpu", autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """Figures over all records, in evaluation mode; the model's mode is as before afterwards.

        Args:
            micro_batch: records computed at once; None for bounds on records, tokens and outputs.

        Raises:
            ValueError: there are no records.
            MemoryError: with what helps.
        """
        if not len(records):
            raise ValueError("there is nothing to evaluate on: no row has a label or an answer within --max-length")
        training = model.training
        model.eval()
        autocast = (contextlib.nullcontext() if autocast_dtype is None
                    else torch.autocast(torch.device(device).type, dtype=autocast_dtype))
        sums: dict[str, float] = {}
        try:
            tokens = min(_EVALUATION_TOKENS, self.most_tokens)
            for length, indices in _by_length(records.lengths, self.max_length, most=micro_batch or _EVALUATION_BATCH,
                                              tokens=None if micro_batch else tokens):
                batch = self.collate(records, indices, length, device)
                with autocast:
                    measured = self.measure(model, batch)
                for name, values in measured.items():
                    sums[name] = sums.get(name, 0.0) + float(values.cpu().double().sum())
        finally:
            model.train(training)
        return self.summarize(sums)

    def _each(self, rows: Sequence[int], encode: Callable[[Sequence[int]], Sequence[Encoded]],
              unusable: Counter[str] | None) -> Iterator[tuple[int, Encoded]]:
        """(row, what `encode` makes of it); but for those that it fails on, where `unusable` counts them."""
        if not rows:
            return
        try:
            encoded = encode(rows)
        except BaseException as error:  # tokenizers in Rust panic past `Exception`
            if unusable is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            if len(rows) == 1:
                unusable["the tokenizer or its chat template fails"] += 1
            else:
                for row in rows:
                    yield from self._each([row], encode, unusable)
            return
        yield from zip(rows, encoded, strict=True)

    def _chunks(self, rows: Rows) -> Iterator[range]:
        for start in range(0, len(rows), _CHUNK):
            yield range(start, min(start + _CHUNK, len(rows)))


def _by_length(lengths: np.ndarray, max_length: int, *, most: int,
               tokens: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """(padded length, indices) of batches of like length, of at most so many records and, but for a single record,
    so many padded tokens.
    """
    order = np.argsort(lengths, kind="stable")
    padded = np.maximum(lengths, np.minimum(-(-lengths // _EVALUATION_BUCKET) * _EVALUATION_BUCKET, max_length))[order]
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < min(start + most, len(order)) and (
                tokens is None or (stop + 1 - start) * padded[stop] <= tokens):
            stop += 1
        yield int(padded[stop - 1]), order[start:stop]
        start = stop
