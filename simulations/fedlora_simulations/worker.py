"""A worker of a simulation: a process of its own, here or on another machine, that trains whichever client it is given.

It holds one copy of the base model and nothing of any client. Sessions, ledger and the server's side stay in the main
process: `ClientSession.begin` charges a training, any worker does it, and `ClientSession.finish` takes what it gave.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedlora.adapters import attach_planned
from fedlora.adapters.sketches import sketch_plan
from fedlora.models import load
from fedlora.plan import RunPlan
from fedlora.tasks import task_for
from fedlora.training import Trainer, TrainingJob, TrainResult, resolve_device


@dataclass(frozen=True)
class Blueprint:
    """From which every worker builds the same trainer.

    Attributes:
        plan: of the run.
        model: folder of the base model.
        device, precision, micro_batch, compiled: as of `Trainer`. With several GPUs, workers take them in turn.
        threads: of each worker.
        together: whether the trainings that a worker is given at a time are done in lockstep.
    """

    plan: RunPlan
    model: Path
    device: str
    precision: str
    micro_batch: int | None
    threads: int
    compiled: bool = False
    together: bool = False

    def build(self, index: int) -> Trainer:
        """The trainer of the worker with this number, from 0.

        Raises:
            ValueError: the device is not there.
        """
        device = str(resolve_device(self.device))
        if device == "cuda":
            device = f"cuda:{index % torch.cuda.device_count()}"
        loaded = load(self.model, self.plan.task, self.plan.labels)
        return Trainer(attach_planned(loaded, self.plan), task_for(self.plan, loaded.tokenizer), device=device,
                       precision=self.precision, micro_batch=self.micro_batch, threads=self.threads,
                       compiled=self.compiled)


class Worker:
    """Trains what it is given, by a trainer that it builds when it has its first training.

    A private start trains another adapter than the rounds after it; a worker holds one of the two at a time.
    """

    def __init__(self, blueprint: Blueprint, index: int) -> None:
        self._blueprint, self._index = blueprint, index
        self._trainer: Trainer | None = None
        self._sketches = False

    def train(self, trainings: Sequence[TrainingJob]) -> list[TrainResult]:
        """The results of trainings of one round, in order."""
        sketches = any(training.round == 0 for training in trainings)  # all of them or none
        if self._trainer is None or sketches is not self._sketches:
            self._trainer = None  # its memory first
            blueprint = self._blueprint
            if sketches:
                blueprint = replace(blueprint, plan=sketch_plan(blueprint.plan))
            self._trainer, self._sketches = blueprint.build(self._index), sketches
        if self._blueprint.together:
            return self._trainer.train_together(trainings)
        return [self._trainer.train(training) for training in trainings]


class Workers(ABC):
    """Some workers, wherever they are: give those that are free something to do, and wait for what comes first."""

    @property
    @abstractmethod
    def free(self) -> int:
        """How many have nothing to do."""

    @abstractmethod
    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        """Have a free worker do these trainings of one round."""

    @abstractmethod
    def done(self) -> tuple[str, list[TrainResult]]:
        """Wait until a worker is done; the key it was started with, and its results.

        Raises:
            WorkerLost: a worker's process is gone.
            Exception: what the training raised in the worker.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers, whatever they do. May be called twice."""


class ThisProcess(Workers):
    """No worker at all: the trainings are done here, while they are waited for.

    Args:
        sketch_trainer: gives the trainer of a private start.
    """

    def __init__(self, trainer: Trainer, sketch_trainer: Callable[[], Trainer]) -> None:
        self._trainer, self._sketch_trainer = trainer, sketch_trainer
        self._started: tuple[str, Sequence[TrainingJob]] | None = None

    @property
    def free(self) -> int:
        return int(self._started is None)

    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        self._started = key, trainings

    def done(self) -> tuple[str, list[TrainResult]]:
        assert self._started is not None, "nothing was started"
        (key, trainings), self._started = self._started, None
        trainer = self._trainer if trainings[0].round else self._sketch_trainer()
        return key, trainer.train_together(trainings)

    def close(self) -> None:
        self._started = None


class WorkerLost(RuntimeError):
    """A worker's process ended although it had something to do."""


def threads_each(workers: int) -> int:
    """CPU threads for each of some workers on this machine. More in all than there are cores wait for each other by
    spinning: two processes with two threads each are slower on two cores than one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)
