"""Workers that are Ray actors, on this machine or on all machines of a Ray cluster.

Every machine of a cluster needs the same FedLoRA version, and the base model in the same folder; both are checked.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

import fedlora
from fedlora import models
from fedlora.plan import Refused
from fedlora.training import TrainingJob, TrainResult

from .worker import Blueprint, Worker, WorkerLost, Workers

_ANSWERS_WITHIN_S = 20.0


class RayWorkers(Workers):
    """A group of Ray actors, each with one copy of the base model; `close` ends them.

    Each actor gets as many CPUs as it has threads, and one GPU if it trains on one. If Ray was started here, `close`
    stops it. If Ray was already running in this process, `close` leaves it running; a cluster at `address` goes on in
    any case.

    Args:
        blueprint: what each actor builds its trainer from.
        count: number of actors.
        address: address of a running cluster, as `ray.init` takes it; None starts Ray on this machine.

    Raises:
        ValueError: Ray is not installed or does not start, nothing answers at `address`, or the cluster is too small.
    """

    def __init__(self, blueprint: Blueprint, count: int, address: str | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise ValueError("--engine ray needs Ray, which is not installed: pip install 'fedlora[ray]'") from None
        self._ray = ray
        self._actors: list[Any] = []
        self._begun_here = not ray.is_initialized()
        if self._begun_here:
            self._begin(address, count * blueprint.threads)
        try:
            resources = self._share(blueprint, count)
        except ValueError:
            self.close()
            raise
        actor = ray.remote(_Actor).options(**resources)
        self._actors = [actor.remote(blueprint, index) for index in range(count)]
        self._free = list(self._actors)
        self._busy: dict[Any, tuple[Any, str]] = {}

    def _begin(self, address: str | None, cpus: int) -> None:
        here: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        try:
            if host and port.isdigit():  # Ray itself would try for many minutes
                socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN_S).close()
            self._ray.init(address=address or "local", **here)
        except (ConnectionError, TimeoutError, socket.gaierror) as error:
            raise ValueError(f"--ray-address {address}: no Ray cluster answers there ({error}). Start one with "
                             "`ray start --head`, leave the flag out, or set RAY_AUTH_MODE=token if that cluster asks "
                             "for tokens (with --ray-address auto Ray finds out by itself)") from None
        except Exception as error:  # Ray raises a bare Exception if its processes do not start in time
            raise ValueError(f"Ray could not be started: {error}") from error

    def _share(self, blueprint: Blueprint, count: int) -> dict[str, float]:
        """Check that the cluster is large enough; return what each actor takes of it."""
        there = self._ray.cluster_resources()
        gpu = blueprint.device == "cuda" or (blueprint.device == "auto" and there.get("GPU", 0) >= count)
        needed = {"CPU": count * blueprint.threads, "GPU": count * gpu}
        for kind, number in needed.items():
            if there.get(kind, 0) < number:
                raise ValueError(f"{count} workers of {blueprint.threads} threads need {number} {kind}s, but the Ray "
                                 f"cluster has {there.get(kind, 0):g}; use fewer --workers or --threads")
        return {"num_cpus": blueprint.threads, "num_gpus": int(gpu)}

    @property
    @override
    def free(self) -> int:
        return len(self._free)

    @override
    def start(self, key: str, trainings: Sequence[TrainingJob]) -> None:
        actor = self._free.pop()
        self._busy[actor.run.remote(trainings)] = actor, key

    @override
    def done(self) -> tuple[str, list[TrainResult]]:
        [ready], _ = self._ray.wait(list(self._busy), num_returns=1)
        actor, key = self._busy.pop(ready)
        try:
            answer = self._ray.get(ready)
        except self._ray.exceptions.RayError as error:  # an exception of the training comes as an answer instead
            raise WorkerLost(f"a Ray worker was lost ({_first_line(error)}). If memory ran out, use fewer --workers, a "
                             "lower --micro-batch or --precision bf16") from None
        self._free.append(actor)
        if isinstance(answer, Exception):
            raise answer
        return key, answer

    @override
    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._free, self._busy = [], [], {}
        if self._begun_here:
            self._ray.shutdown()


class _Actor:
    """A Ray actor that holds a worker. It returns exceptions as values, because Ray would wrap raised ones."""

    def __init__(self, blueprint: Blueprint, index: int) -> None:
        self._blueprint, self._index = blueprint, index
        self._worker: Worker | None = None

    def run(self, trainings: Sequence[TrainingJob]) -> list[TrainResult] | Exception:
        try:
            if self._worker is None:
                _check(self._blueprint)
                self._worker = Worker(self._blueprint, self._index)
            return self._worker.train(trainings)
        except Refused as refused:
            return ValueError(f"a machine of the Ray cluster is not set up like this one: {refused}")
        except Exception as error:
            error.add_note(f"In Ray worker {self._index}:\n{traceback.format_exc()}")
            return error


def _first_line(error: Exception) -> str:
    """Return the first line of Ray's error, without the traceback; for an error of a task, that of its cause."""
    cause = getattr(error, "cause", None)
    return next(iter(str(cause or error).splitlines()), type(cause or error).__name__)


def _check(blueprint: Blueprint) -> None:
    """Check that this machine has the same FedLoRA version and the same base model.

    Raises:
        Refused: the version or the model differs.
    """
    plan = blueprint.plan
    if plan.fedlora_version != fedlora.__version__:
        raise Refused("version-mismatch", f"FedLoRA {fedlora.__version__} there, {plan.fedlora_version} here")
    models.obtain(plan.model, path=blueprint.model)
