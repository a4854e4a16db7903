"""Ray workers: the same bits as one process."""

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from fedlora.config import SimulationConfig, read_config
from fedlora_server.run_setup import find_model
from fedlora_simulations.population import Method, populate
from fedlora_simulations.ray_workers import RayWorkers
from fedlora_simulations.simulated_run import simulate
from fedlora_simulations.worker import Blueprint, WorkerLost
from tests.covering import few
from tests.federation import STRATEGIES, plan_of
from tests.processes import write_rows

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                               reason="Ray is not installed: pip install 'fedlora[ray]'")


def simulated(tmp_path, checkpoint, strategy, *arguments):
    for i in range(3):
        write_rows(tmp_path / "data" / f"hospital-{i}.jsonl", seed=i)
    options = read_config(SimulationConfig, [
        f"--model={checkpoint('bert')}", f"--data={tmp_path / 'data'}", "--partition=files", "--rank=2", "--rounds=2",
        "--local-steps=2", "--batch-size=8", "--max-length=16", "--threads=1", "--device=cpu", "--precision=fp32",
        *arguments])
    return simulate(options, Method.parse(strategy), 5, find_model(options), populate(options, 5))


@needs_ray
@pytest.mark.parametrize(("strategy", "flags"), few(
    ("fedsvd", ()), ("fedsvd", ("--secure-aggregation", "--local-steps=1")), ("ffa-lora:dp", ()),
    ("pissa:lora-ga-clients", ("--privacy=off", "--epsilon=inf")), ("randlora", ("--family-options=gamma=0",)),
    *((strategy, ()) for strategy in STRATEGIES if strategy not in ("fedsvd", "randlora"))))
def test_ray_workers_end_with_the_bits_of_one_process(tmp_path, checkpoint, strategy, flags):
    alone = simulated(tmp_path, checkpoint, strategy, *flags)
    over_ray = simulated(tmp_path, checkpoint, strategy, *flags, "--engine=ray", "--workers=2")
    assert alone.result.rounds == over_ray.result.rounds == 2 and alone.epsilons == over_ray.epsilons
    assert [name for name, array in alone.result.state.items()
            if array.tobytes() != over_ray.result.state[name].tobytes()] == []


@needs_ray
def test_what_goes_wrong_in_a_ray_worker_is_told_here(tmp_path, checkpoint):
    class Deadly:
        def __reduce__(self):
            return os._exit, (1,)

    blueprint = Blueprint(plan_of("fedsvd"), checkpoint("bert"), "cpu", "fp32", None, 1)
    workers = RayWorkers(blueprint, 1, None)
    try:
        workers.start("order", [])
        with pytest.raises(ValueError, match=r"not set up like this one.*model-mismatch"):
            workers.done()
        assert workers.free == 1
        workers.start("order", Deadly())
        with pytest.raises(WorkerLost, match="lost"):
            workers.done()
    finally:
        workers.close()


@needs_ray
def test_an_order_that_a_ray_worker_cannot_read_ends_without_a_traceback():
    class Unreadable:
        def __reduce__(self):
            return int, ("no number",)

    workers = RayWorkers(Blueprint(plan_of("fedsvd"), None, "cpu", "fp32", None, 1), 1, None)
    try:
        workers.start("order", Unreadable())
        with pytest.raises(WorkerLost, match="no number"):
            workers.done()
    finally:
        workers.close()


class OneActorRay:
    """A stand-in for Ray, where it is not installed: just enough of it to lose one order."""

    class RayError(Exception):
        pass

    class RayTaskError(RayError):
        cause = ZeroDivisionError("what was wrong")

    class OutOfMemoryError(RayError):
        pass

    def __init__(self, error):
        self.exceptions, self.error = self, error

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 1.0}

    def remote(self, kind):
        actor = SimpleNamespace(run=SimpleNamespace(remote=lambda trainings: "order"))
        return SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=lambda blueprint, index: actor))

    def wait(self, orders, num_returns):
        return orders, []

    def get(self, order):
        raise self.error


@pytest.mark.parametrize("error, said", [
    (OneActorRay.OutOfMemoryError("node 1 ran out of memory\nand more"), r"\(node 1 ran out of memory\)"),
    (OneActorRay.RayTaskError("ray::run()\n  File\nerror"), r"\(what was wrong\)"),
    (OneActorRay.RayError(), r"\(RayError\)"),
])
def test_whatever_ray_raises_is_a_lost_worker(monkeypatch, error, said):
    monkeypatch.setitem(sys.modules, "ray", OneActorRay(error))
    workers = RayWorkers(Blueprint(plan_of("fedsvd"), None, "cpu", "fp32", None, 1), 1, None)
    workers.start("order", [])
    with pytest.raises(WorkerLost, match=said):
        workers.done()


@needs_ray
def test_a_ray_address_where_nothing_answers_is_named():
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:1: no Ray cluster"):
        RayWorkers(Blueprint(plan_of("fedsvd"), None, "cpu", "fp32", None, 1), 1, "127.0.0.1:1")


def test_a_ray_address_needs_the_ray_engine(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="--engine ray"):
        simulated(tmp_path, checkpoint, "fedsvd", "--ray-address=auto")


def test_without_ray_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'fedlora\[ray\]'"):
        RayWorkers(Blueprint(plan_of("fedsvd"), None, "cpu", "fp32", None, 1), 1, None)
