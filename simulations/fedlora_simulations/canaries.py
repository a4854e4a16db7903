"""Canaries for audits: records that are easy to recognise, and a trainer that can replace their gradients.

    text      random words with a random label, which an adversary can use who may only write records
    gradient  a random direction, far longer than the clip norm, in place of the record's gradient: the strongest
              canary, for an adversary who chooses gradients. It tests clipping, noise and accounting, not the model.

A fair coin decides for each canary whether it is in the training data. The production code is used as it is: subclasses
that only an audit creates write the gradients into the buffer that the code clips from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedlora.adapters import AdaptedModel
from fedlora.data import Rows
from fedlora.privacy import RandomStream
from fedlora.tasks import Records, Task
from fedlora.training import Trainer, TrainingJob, TrainResult
from fedlora.training.gradient_buffer import GradientBuffer

KINDS = ("text", "gradient")

WORDS = 8
"""Number of random words of a text canary."""

LENGTH = 10.0
"""L2 norm of a gradient canary, in clip norms; if the clip norm is below 1, the norm itself.

It is so long that a step which forgets to clip is noticed."""

NO_CLIPPING = 1e30


@dataclass(frozen=True)
class Canaries:
    """The canaries of an audit.

    Attributes:
        rows: [m] the canaries as rows of text with labels.
        included: [m] bool, the coins: whether each canary is in the data.
        directions: [m, values] float32, the gradients of gradient canaries; None for text canaries.
    """

    rows: Rows
    included: np.ndarray
    directions: torch.Tensor | None

    def training_rows(self, others: Rows) -> Rows:
        """Return the client's own rows, followed by the canaries that are in the data."""
        chosen = self.rows.take(np.flatnonzero(self.included))
        # The canaries' places start as copies of a row, so that the fields which canaries do not set are valid.
        both = others.take([*range(len(others)), *[0] * len(chosen)])
        return dataclasses.replace(
            both, texts=others.texts + chosen.texts, labels=(others.labels or ()) + (chosen.labels or ()),
            seconds=None if others.seconds is None else others.seconds + (chosen.seconds or ()))


def craft(kind: str, count: int, like: Rows, labels: Sequence[str], tokenizer: Any, *, values: int, clip_norm: float,
          seed: int) -> Canaries:
    """Draw the canaries and their coins.

    Args:
        kind: one of `KINDS`.
        count: number of canaries.
        like: the client's rows; canaries have a second text if these do.
        labels: the label set.
        tokenizer: tokenizer of the base model, whose words the texts are made of.
        values: number of trained values, the length of a gradient.
        clip_norm: the plan's clip norm.
        seed: seed of the canaries and the coins.
    """
    random = np.random.default_rng([seed, KINDS.index(kind)])
    words = _words(tokenizer)

    def texts() -> tuple[str, ...]:
        return tuple(tokenizer.decode(random.choice(words, WORDS)) for _ in range(count))

    rows = dataclasses.replace(
        like.take([0] * count), texts=texts(), seconds=None if like.seconds is None else texts(),
        labels=tuple(labels[i] for i in random.integers(len(labels), size=count)))
    directions = None
    if kind == "gradient":
        directions = torch.from_numpy(random.standard_normal((count, values), dtype=np.float32))
        directions *= LENGTH * max(1.0, clip_norm) / directions.norm(dim=1, keepdim=True)
    coins = RandomStream.derived(seed, "audit", 0, "inclusion").uniform(count) < 0.5
    return Canaries(rows, coins, directions)


def _words(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that are words or parts of words; if these are few, of all tokens but special ones."""
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(len(tokenizer)) if i not in special]
    names = tokenizer.convert_ids_to_tokens(plain)
    words = [i for i, name in zip(plain, names, strict=True) if name.isalpha() and len(name) > 1]
    return words if len(words) >= 20 else plain


class CanaryTrainer(Trainer):
    """A trainer that, while it trains, replaces the gradients of the records from `first` on by `directions`.

    Args:
        adapted: the model with its adapters.
        task: the task.
        first: number of ordinary records; the canaries that are in the data come after them.
        directions: [canaries in the data, values] the gradients; None changes nothing.
        options: further arguments of `Trainer`.
    """

    def __init__(self, adapted: AdaptedModel, task: Task, *, first: int, directions: torch.Tensor | None,
                 **options: Any) -> None:
        super().__init__(adapted, task, **options)
        self._first, self._directions = first, directions
        if directions is not None:
            self.collect_into(_InjectingBuffer(
                [(parameter, spec.group) for spec, parameter in adapted.trained_parameters()]))

    @override
    def train(self, job: TrainingJob, stop: Callable[[], bool] = lambda: False,
              stepped: Callable[[int], object] = lambda steps: None) -> TrainResult:
        if self._directions is None:
            return super().train(job, stop, stepped)
        if not job.private:
            # A plain step has no gradients of single records to replace. The private step does the same if it neither
            # clips nor adds noise.
            job = dataclasses.replace(job, noise_multiplier=0.0, clip_norm=NO_CLIPPING)
        assert isinstance(self.buffer, _InjectingBuffer) and job.records.units is None
        self.show_batch_invariance(job.run)  # checked on the real gradients
        self.buffer.first, self.buffer.directions = self._first, self._directions
        try:
            return super().train(job, stop, stepped)
        finally:
            self.buffer.directions = None

    @override
    def micro_batches(self, records: Records, indices: np.ndarray, *,
                      private: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        for length, places in super().micro_batches(records, indices, private=private):
            if isinstance(self.buffer, _InjectingBuffer):
                self.buffer.part = indices[places]
            yield length, places


class _InjectingBuffer(GradientBuffer):
    """A gradient buffer that puts the canaries' gradients in place just before its rows are read."""

    first = 0
    part: np.ndarray
    directions: torch.Tensor | None = None

    @override
    def check_complete(self) -> None:
        super().check_complete()
        if self.directions is not None:
            canary = torch.from_numpy(self.part) - self.first
            inside = canary >= 0
            self.rows[inside] = self.directions[canary[inside]].to(self.rows)
