"""Canaries for audits: records made to be recognised, and a trainer that can give some a gradient of its own choice.

text      random words with a random label: what an adversary can do who may only write records
gradient  a random direction, far longer than the clip norm, in place of the record's gradient: the strongest there is,
          for an adversary who chooses gradients. It puts clipping, noise and accounting to the test, not the model.

Each is in the training data by a fair coin of its own. The production code is used as it is: the gradients are put into
the buffer that it clips from, by subclasses that only an audit makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdaptedModel
from fedlora.data import Rows
from fedlora.privacy import RandomStream
from fedlora.tasks import Records, Task
from fedlora.training import Trainer, TrainingJob, TrainResult
from fedlora.training.gradient_buffer import GradientBuffer

KINDS = ("text", "gradient")

WORDS = 8
"""Random words of a text canary."""

LENGTH = 10.0
"""Of a gradient canary, L2, in clip norms or in all, whichever is more: a step that forgets to clip is seen."""

NO_CLIPPING = 1e30


@dataclass(frozen=True)
class Canaries:
    """What is planted, and where.

    Attributes:
        rows: [m] as text, with labels.
        included: [m] bool, the coins.
        directions: [m, values] float32, the gradients of gradient canaries; None for text.
    """

    rows: Rows
    included: np.ndarray
    directions: torch.Tensor | None

    def training_rows(self, others: Rows) -> Rows:
        """The client's own rows, and after them the canaries that are in."""
        chosen = self.rows.take(np.flatnonzero(self.included))
        both = others.take([*range(len(others)), *[0] * len(chosen)])  # fields that canaries do not set stay lawful
        return dataclasses.replace(
            both, texts=others.texts + chosen.texts, labels=(others.labels or ()) + (chosen.labels or ()),
            seconds=None if others.seconds is None else others.seconds + (chosen.seconds or ()))


def craft(kind: str, count: int, like: Rows, labels: Sequence[str], tokenizer: Any, *, values: int, clip_norm: float,
          seed: int) -> Canaries:
    """Draw canaries, and the coins.

    Args:
        kind: one of `KINDS`.
        like: the client's rows; canaries have a second text if these do.
        values: number of trained values, the length of a gradient.
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
    """Ids of tokens that are words or parts of words; all but the special ones where there are hardly any."""
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(len(tokenizer)) if i not in special]
    names = tokenizer.convert_ids_to_tokens(plain)
    words = [i for i, name in zip(plain, names, strict=True) if name.isalpha() and len(name) > 1]
    return words if len(words) >= 20 else plain


class CanaryTrainer(Trainer):
    """A trainer in which the records from `first` on have the gradients `directions`, while it trains.

    Args:
        first: number of ordinary records; the canaries that are in come after them.
        directions: [canaries that are in, values]; None changes nothing.
    """

    def __init__(self, adapted: AdaptedModel, task: Task, *, first: int, directions: torch.Tensor | None,
                 **options: Any) -> None:
        super().__init__(adapted, task, **options)
        self._first, self._directions = first, directions
        if directions is not None:
            self.collect_into(_InjectingBuffer(
                [(parameter, spec.group) for spec, parameter in adapted.trained_parameters()]))

    def train(self, job: TrainingJob, stop: Callable[[], bool] = lambda: False) -> TrainResult:
        if self._directions is None:
            return super().train(job, stop)
        if not job.private:
            # autograd's sum has no gradients of records to replace; without noise and clipping the private step is it
            job = dataclasses.replace(job, noise_multiplier=0.0, clip_norm=NO_CLIPPING)
        assert isinstance(self.buffer, _InjectingBuffer) and job.records.units is None
        self.show_batch_invariance(job.run)  # of gradients as they are
        self.buffer.first, self.buffer.directions = self._first, self._directions
        try:
            return super().train(job, stop)
        finally:
            self.buffer.directions = None

    def micro_batches(self, records: Records, indices: np.ndarray, *,
                      private: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        for length, places in super().micro_batches(records, indices, private=private):
            if isinstance(self.buffer, _InjectingBuffer):
                self.buffer.part = indices[places]
            yield length, places


class _InjectingBuffer(GradientBuffer):
    """Puts the canaries' gradients in place just before the rows are read."""

    first = 0
    part: np.ndarray
    directions: torch.Tensor | None = None

    def check_complete(self) -> None:
        super().check_complete()
        if self.directions is not None:
            canary = torch.from_numpy(self.part) - self.first
            inside = canary >= 0
            self.rows[inside] = self.directions[canary[inside]].to(self.rows)
