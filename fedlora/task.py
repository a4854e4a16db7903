"""The base class of tasks: from rows to records, a model, a loss for each record, and an evaluation.

Each file in `fedlora.tasks` defines one task, as a class assigned to `TASK`. Its class attributes need neither a
tokenizer nor a model, so that options, plans and data files can be checked against them early.
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
"""Most records, and most padded tokens, of a batch in evaluation."""

_OUTPUTS = 2**26
"""Most output values of the model for a batch. A single record may exceed it, as with a large vocabulary."""

_EVALUATION_BUCKET = 8
"""In evaluation, padded lengths are rounded up to a multiple of this."""

Encoded = TypeVar("Encoded")


class Task(ABC):
    """A task: what a record is, what the model predicts, and how the model is evaluated.

    The first four class attributes must be literals: the checks of a plan read them from the file without importing it
    (`fedlora.plan.task_facts`).

    Attributes:
        name: class attribute, the task's key; the name of its file.
        model_is: class attribute, the kind of model in words: "a causal language model".
        has_labels: class attribute, whether answers are names of classes, so that a run has a label set.
        has_head: class attribute, whether the model ends in a layer that a base checkpoint may lack and that can be
            trained too.
        rows: class attribute, the columns that data files of this task have.
        auto_class: class attribute, the transformers class that loads a model for the task.
        model_types: class attribute, the model types (`model_type` in config.json) that `auto_class` can load.
        metric: class attribute, the name of the figure that runs are compared by.
        peft_type: class attribute, PEFT's task type for the exported adapter.
        scored_by: class attribute, the name of what the mean of `score` is.
        tokenizer: the base model's tokenizer.
        max_length: number of tokens kept of a record.
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
    scored_by: ClassVar[str] = "probability"

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad token. Set one, as in tokenizer.pad_token = tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def of(cls, run: RunPlan, tokenizer: Any) -> Self:
        """Return the task that a plan describes, with this tokenizer."""
        return cls(tokenizer, run.max_length)

    @classmethod
    def check_answered(cls, rows: Rows, file: str, wanted_for: str) -> None:
        """Check that at least one row has an answer, if the task's rows have an answer column.

        Args:
            rows: the rows of a file.
            file: its name, for the message.
            wanted_for: what needs the answers, for the message.

        Raises:
            ValueError: no row has an answer.
        """
        if cls.rows.answer is not None and not any(answer is not None for answer in rows.answers or ()):
            column = cls.rows.answer.column
            raise ValueError(f"{file} has no {column}s; {wanted_for} needs a {column} column (--column {column}=NAME "
                             "names another)")

    @classmethod
    def why_not(cls, model_type: str, *, encoder: bool) -> str:
        """Return why a base model cannot do the task, and what to choose instead; "" if no reason is known.

        Args:
            model_type: `model_type` in the model's config.json.
            encoder: whether the model is an encoder, made to fill gaps in texts.
        """
        return ""

    @classmethod
    def model_options(cls, labels: int) -> Mapping[str, Any]:
        """Return the settings of the model's config that the task requires.

        Args:
            labels: number of labels in the run's label set.
        """
        return {}

    @classmethod
    def head(cls, model: nn.Module) -> str | None:
        """Return the name of the head's final linear layer; None if the task has no head.

        That is the model's last linear layer with as many outputs as there are labels.

        Raises:
            ValueError: there is no such layer.
        """
        if not cls.has_head:
            return None
        outputs: int = model.config.num_labels  # type: ignore[union-attr, assignment]
        names: list[str] = [name for name, module in model.named_modules()
                            if isinstance(module, nn.Linear) and module.out_features == outputs]
        if not names:
            raise ValueError(f"{type(model).__name__} has no final linear layer with {outputs} outputs; choose another "
                             "model")
        return names[-1]

    @abstractmethod
    def encode(self, rows: Rows, unusable: Counter[str] | None = None) -> Records:
        """Tokenise rows. Rows that cannot be trained on give no record, and are counted in `Records.left_out`.

        Args:
            rows: the rows to tokenise.
            unusable: counts the rows left out, by reason. Give it in private training: then no row raises an error,
                because an error that depends on one row would disclose something about that row. Each unusable row
                stands for a record that contributes nothing.

        Raises:
            ValueError: `unusable` was not given, and a row has a fault that its owner should correct. The message names
                file and line.
        """

    @abstractmethod
    def made_up(self, tokens: Sequence[Sequence[int]]) -> Records:
        """Return one made-up record for each sequence of tokens, to try a model before it sees real records."""

    @abstractmethod
    def per_record_loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of each record, [records] float32. It must not depend on the other records of the batch."""

    @abstractmethod
    def measure(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return what an evaluation needs of each record: name → [records] or [records, k] values.

        "loss" is among them.
        """

    @abstractmethod
    def summarize(self, values: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Return the evaluation's figures; `metric`, "loss" and "count" among them (see `fedlora.figures`).

        Args:
            values: what `measure` returned, of all records: name → [n] or [n, k] float64.
        """

    def score(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return how well the model does on each record, from 0 to 1: [n]; by default exp(-loss).

        Args:
            values: what `measure` returned, of all records: name → [n] or [n, k] float64.
        """
        probability: np.ndarray = np.exp(-values["loss"])
        return probability

    def collate(self, records: Records, indices: np.ndarray, length: int, device: str | torch.device = "cpu", *,
                rows: int | None = None) -> Batch:
        """Make a batch of records as `fedlora.records.collate` does, with `filler` in the further rows.

        Args:
            records: the records to choose from.
            indices: which of them, in this order.
            length: tokens of each row; at least as many as the longest chosen record has.
            device: where to put the tensors.
            rows: number of rows of the batch; None for one row for each record.
        """
        return collate(records, indices, length, device, rows=rows, filler=self.filler)

    @functools.cached_property
    def filler(self) -> int:
        """The first token without a special meaning; it fills rows that hold no record."""
        special = set(self.tokenizer.all_special_ids)
        return next(token for token in range(len(self.tokenizer)) if token not in special)

    @property
    def outputs_per_token(self) -> int:
        """Approximate number of values that the model outputs for each token."""
        return 1

    @property
    def most_tokens(self) -> int:
        """Most padded tokens of a batch for which the model's outputs fit into memory."""
        return max(1, _OUTPUTS // self.outputs_per_token)

    @memory_advice("evaluation", "lower --max-length, choose a smaller --model, or leave out --eval-data")
    def evaluate(self, model: torch.nn.Module, records: Records, *, micro_batch: int | None = None,
                 device: str | torch.device = "cpu", autocast_dtype: torch.dtype | None = None) -> dict[str, float]:
        """Evaluate a model on records and return the figures of `summarize`.

        The model is in evaluation mode meanwhile, and back in its former mode afterwards.

        Args:
            model: the model to evaluate.
            records: the held-out records.
            micro_batch: records computed at once; None to limit records, tokens and outputs instead.
            device: where to compute.
            autocast_dtype: dtype of the computation; None for the model's own.

        Raises:
            ValueError: there are no records.
            MemoryError: memory ran out. The message says what helps.
        """
        if not len(records):
            raise ValueError("there is nothing to evaluate on: no row has a label, or an answer within --max-length")
        return self.summarize(self.measured(model, records, micro_batch=micro_batch, device=device,
                                            autocast_dtype=autocast_dtype))

    @torch.no_grad()
    def measured(self, model: torch.nn.Module, records: Records, *, micro_batch: int | None = None,
                 device: str | torch.device = "cpu", autocast_dtype: torch.dtype | None = None,
                 done: Callable[[int], object] = lambda count: None) -> dict[str, np.ndarray]:
        """Return what `measure` returns, of all records in their order: name → [n] or [n, k] float64.

        The model is in evaluation mode meanwhile, and back in its former mode afterwards.

        Args:
            model: the model.
            records: n > 0 records.
            micro_batch: records computed at once; None to limit records, tokens and outputs instead.
            device: where to compute.
            autocast_dtype: dtype of the computation; None for the model's own.
            done: called after each batch with the number of its records.
        """
        training = model.training
        model.eval()
        autocast = (contextlib.nullcontext() if autocast_dtype is None
                    else torch.autocast(torch.device(device).type, dtype=autocast_dtype))
        parts: dict[str, list[np.ndarray]] = {}
        order: list[np.ndarray] = []
        try:
            tokens = min(_EVALUATION_TOKENS, self.most_tokens)
            for length, indices in _by_length(records.lengths, self.max_length, most=micro_batch or _EVALUATION_BATCH,
                                              tokens=None if micro_batch else tokens):
                batch = self.collate(records, indices, length, device)
                with autocast:
                    measured = self.measure(model, batch)
                for name, values in measured.items():
                    parts.setdefault(name, []).append(values.cpu().double().numpy())
                order.append(indices)
                done(len(indices))
        finally:
            model.train(training)
        place = np.argsort(np.concatenate(order))
        return {name: np.concatenate(part)[place] for name, part in parts.items()}

    def _each(self, rows: Sequence[int], encode: Callable[[Sequence[int]], Sequence[Encoded]],
              unusable: Counter[str] | None) -> Iterator[tuple[int, Encoded]]:
        """Yield each row with its encoding. If `encode` fails on a row, count that row in `unusable` and go on.

        Without `unusable`, the error is raised.
        """
        if not rows:
            return
        try:
            encoded = encode(rows)
        except BaseException as error:  # a panic in a Rust tokenizer is not an `Exception`
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
    """Group records of similar length into batches, and yield the padded length and the indices of each.

    Args:
        lengths: [n] number of tokens of each record.
        max_length: padded lengths are not rounded up beyond this.
        most: most records of a batch.
        tokens: most padded tokens of a batch, except for a batch of a single record; None for no limit.
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
