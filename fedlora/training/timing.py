"""The time that training takes on this machine, measured with made-up records."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

import numpy as np

from fedlora.adapters import AdaptedModel
from fedlora.models import embedded_tokens
from fedlora.records import Records
from fedlora.task import Task
from fedlora.training.job import TrainingJob, TrainResult


class Timed(Protocol):
    """The part of `fedlora.training.Trainer` that the functions here use."""

    adapted: AdaptedModel
    task: Task

    def train(self, job: TrainingJob) -> TrainResult:
        """Do the local steps of a job."""


def alike(records: Records, trainer: Timed) -> Records:
    """Return made-up records with the lengths and the privacy units of the given ones.

    Args:
        records: the records to imitate.
        trainer: the trainer, whose model's tokens are used.
    """
    task, known = trainer.task, embedded_tokens(trainer.adapted.model)
    words = np.setdiff1d(np.arange(min(len(task.tokenizer), known or len(task.tokenizer))),
                         task.tokenizer.all_special_ids)
    random = np.random.default_rng(0)
    made = task.made_up([random.choice(words, max(2, int(length))).tolist() for length in records.lengths])
    return replace(made, units=records.units)


def seconds_of_steps(trainer: Timed, job: TrainingJob, times: int, *, enough_s: float = float("inf")) -> list[float]:
    """Return the seconds of single steps, one after the other. The first one is the slowest as a rule.

    Args:
        trainer: the trainer; its model's trained tensors change.
        job: the training task, with made-up records. Its attempts 0, 1, … are trained.
        times: number of steps, at least 1.
        enough_s: begin no further step, after the second one, once this many seconds have passed.
    """
    job = replace(job, run=replace(job.run, local_steps=1))
    found: list[float] = []
    for attempt in range(times):
        if attempt > 1 and sum(found) > enough_s:
            break
        began = time.monotonic()
        trainer.train(replace(job, attempt=attempt))
        found.append(time.monotonic() - began)
    return found
