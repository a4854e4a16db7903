"""Workers of a simulation: processes, here or on other machines, that train whichever client they are given.

A worker holds one copy of the base model and keeps nothing of any client. The sessions, the ledger and the server's
side stay in the main process: `ClientSession.begin` charges a training to the ledger, any worker runs it, and
`ClientSession.finish` takes the result.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from typing_extensions import override

from fedlora.adapters import attach_planned
from fedlora.adapters.sketches import sketch_plan
from fedlora.models import load
from fedlora.plan import RunPlan
from fedlora.tasks import task_for
from fedlora.training import Trainer, TrainingJob, TrainResult, resolve_device


@dataclass(frozen=True)
class Blueprint:
    """Everything a worker needs to build its trainer; all workers of a run have the same one.

    Attributes:
        plan: the run's plan.
        model: folder of the base model.
        device: "cpu", "cuda" or "auto", as on the command line. With several GPUs, workers take them in turn.
        precision: as on the command line.
        micro_batch: most records in one pass of the model; None sets a bound on tokens instead.
        threads: CPU threads of each worker.
        compiled: compile the model's blocks, on CUDA.
        together: train all clients that a worker is given in one call in lockstep, over one pass of the base model.
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
        """Build the trainer of the worker with this number, counted from 0.

        Raises:
            ValueError: this machine lacks the device.
        """
        device = str(resolve_device(self.device))
        if device == "cuda":
            device = f"cuda:{index % torch.cuda.device_count()}"
        loaded = load(self.model, self.plan.task, self.plan.labels)
        return Trainer(attach_planned(loaded, self.plan), task_for(self.plan, loaded.tokenizer), device=device,
                       precision=self.precision, micro_batch=self.micro_batch, threads=self.threads,
                       compiled=self.compiled)


class Worker:
    """A worker. It builds its trainer when it is given its first training.

    A private start (round 0) trains a different adapter from the rounds after it. The worker holds the trainer of one
    of the two at a time.
    """

    def __init__(self, blueprint: Blueprint, index: int) -> None:
        self._blueprint, self._index = blueprint, index
        self._trainer: Trainer | None = None
        self._sketches = False

    def train(self, trainings: Sequence[TrainingJob]) -> list[TrainResult]:
        """Run these trainings of one round; return their results in order."""
        sketches = any(training.round == 0 for training in trainings)  # if one of them is in round 0, all are
        if self._trainer is None or sketches is not self._sketches:
            self._trainer = None  # frees its memory before the next one is built
            blueprint = self._blueprint
            if sketches:
                blueprint = replace(blueprint, plan=sketch_plan(blueprint.plan))
            self._trainer, self._sketches = blueprint.build(self._index), sketches
        if self._blueprint.together:
            return self._trainer.train_together(trainings)
        return [self._trainer.train(training) for training in trainings]


class Workers(ABC):
    """A group of workers: trainings are started on free ones, and results are returned as they come."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Number of workers that have nothing to do."""

    @abstractmethod
    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        """Start these trainings of one round on a free worker; `done` returns them under `key`."""

    @abstractmethod
    def done(self) -> tuple[str, list[TrainResult]]:
        """Wait until a worker is done; return the key it was started with and its results.

        Raises:
            WorkerLost: a worker's process has ended.
            Exception: the training failed in the worker; its exception is raised here.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers, also those that are training. May be called twice."""


class ThisProcess(Workers):
    """This process in the role of the only worker: `done` runs the trainings itself, in lockstep.

    Args:
        trainer: trainer of the rounds.
        sketch_trainer: returns the trainer of a private start.
    """

    def __init__(self, trainer: Trainer, sketch_trainer: Callable[[], Trainer]) -> None:
        self._trainer, self._sketch_trainer = trainer, sketch_trainer
        self._started: tuple[str, Sequence[TrainingJob]] | None = None

    @property
    @override
    def free(self) -> int:
        return int(self._started is None)

    @override
    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        self._started = key, trainings

    @override
    def done(self) -> tuple[str, list[TrainResult]]:
        assert self._started is not None, "nothing was started"
        (key, trainings), self._started = self._started, None
        trainer = self._trainer if trainings[0].round else self._sketch_trainer()
        return key, trainer.train_together(trainings)

    @override
    def close(self) -> None:
        self._started = None


class WorkerLost(RuntimeError):
    """Raised when a worker's process has ended during a training."""


def threads_each(workers: int) -> int:
    """Return how many CPU threads each of some workers on this machine should have.

    Together they have no more threads than there are cores. More threads would spin while they wait for each other: on
    two cores, two processes with two threads each are slower than one process.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)
