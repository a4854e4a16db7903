"""Workers that are processes on this machine, each connected to the main process by a pipe."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext

from typing_extensions import override

from fedlora.training import TrainingJob, TrainResult, resolve_device

from .worker import Blueprint, Worker, WorkerLost, Workers

PRELOADED = [Worker.__module__]
"""Modules that the fork server imports before it forks the first worker."""


class ProcessWorkers(Workers):
    """A group of worker processes, which end with this process. Each builds its trainer when its first training comes.

    Workers are never forked from this process, because PyTorch's threads would be missing in them. On Linux without a
    GPU they are forked from a process that has only imported the libraries, so that all workers of all runs share the
    time and the memory of the imports. Elsewhere each worker imports the libraries itself.

    Args:
        blueprint: what each worker builds its trainer from.
        count: number of workers.
    """

    def __init__(self, blueprint: Blueprint, count: int) -> None:
        context: ForkServerContext | SpawnContext = get_context("spawn")
        if sys.platform == "linux" and resolve_device(blueprint.device).type == "cpu":
            context = get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
        self._processes = {}
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, blueprint, index), daemon=True,
                                      name=f"worker {index}")
            process.start()
            theirs.close()  # so that the pipe ends when the process does
            self._processes[ours] = process
        self._free: list[Connection] = list(self._processes)
        self._busy: dict[Connection, str] = {}

    @property
    @override
    def free(self) -> int:
        return len(self._free)

    @override
    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        worker = self._free.pop()
        self._busy[worker] = key
        try:
            worker.send(trainings)
        except OSError:
            raise self._lost(worker) from None

    @override
    def done(self) -> tuple[str, list[TrainResult]]:
        worker = next(one for one in wait(list(self._busy)) if isinstance(one, Connection))
        try:
            answer = worker.recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        self._free.append(worker)
        key = self._busy.pop(worker)
        if isinstance(answer, Exception):
            raise answer
        return key, answer

    def _lost(self, worker: Connection) -> WorkerLost:
        process = self._processes[worker]
        process.join(5)
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"gone with exit code {code}"
        return WorkerLost(f"{process.name} was {how}. If memory ran out, use fewer --workers, a lower --micro-batch or "
                          "--precision bf16")

    @override
    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for worker, process in self._processes.items():
            process.join()
            worker.close()
        self._processes, self._free, self._busy = {}, [], {}


def _serve(connection: Connection, blueprint: Blueprint, index: int) -> None:
    """Run a worker process: train what comes over the pipe until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends this one
    worker = Worker(blueprint, index)
    while True:
        answer: list[TrainResult] | Exception
        try:
            trainings = connection.recv()
        except EOFError:
            return
        try:
            answer = worker.train(trainings)
        except Exception as error:
            error.add_note(f"In worker {index}:\n{traceback.format_exc()}")
            answer = error
        try:
            connection.send(answer)
        except OSError:  # the main process is gone
            return
