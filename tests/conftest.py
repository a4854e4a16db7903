from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.processes import Deployment

os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported; more threads only slow tiny models down

# background jobs of a shell script, and the processes they start, ignore Ctrl-C, which tests send to their processes
signal.signal(signal.SIGINT, signal.default_int_handler)

WAITING = frozenset({"test_attacks", "test_benchmarks", "test_chaos", "test_checks", "test_demo", "test_docs",
                     "test_end_to_end", "test_files_of_protocol_4", "test_handed_on", "test_hostile_server",
                     "test_intruders", "test_killed_sweep", "test_kills", "test_neighbours", "test_notebook",
                     "test_onboarding", "test_operations", "test_orderly_stop", "test_readme", "test_restarts",
                     "test_snapshots", "test_soak", "test_strategy_toys", "test_superlink", "test_tls",
                     "test_workers", "test_written_down"})
"""Test files whose tests start processes and wait for them."""


def pytest_xdist_auto_num_workers() -> int:
    """Return more workers than there are cores: tests of real processes spend most of their time waiting."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread the files whose tests wait for processes evenly between the files of other tests, the longest test first.

    Left in place, they would come last and all wait at the same time. A file stays whole: what its tests share would
    be made anew for each test that comes after one of another file.
    """
    items.sort(key=lambda item: item.name != "test_a_first_run_by_the_readme_goes_as_it_says")
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    waiting = [tests for tests in files if tests[0].path.stem in WAITING]
    others = [tests for tests in files if tests[0].path.stem not in WAITING]
    total, done = sum(map(len, others)), 0
    items[:] = waiting[0] if waiting else []
    placed = min(1, len(waiting))
    for tests in others:
        items += tests
        done += len(tests)
        stop = max(placed, len(waiting) * done // total)
        for file in waiting[placed:stop]:
            items += file
        placed = stop
    for file in waiting[placed:]:
        items += file


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through the libraries and the tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a tiny checkpoint, written once per session. Do not write to it."""
    from tests.tiny import tiny_checkpoint  # imports torch, which the process that distributes the tests does not need

    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tiny_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder_of


@pytest.fixture
def deploy(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Iterator[Callable[[str], Deployment]]:
    """Start deployments, each in a folder of its own."""
    from tests.processes import Deployment

    started: list[Deployment] = []

    def deploy(name: str) -> Deployment:
        folder = tmp_path / name
        folder.mkdir()
        started.append(Deployment(folder, checkpoint("bert")))
        return started[-1]

    yield deploy
    for deployment in started:
        deployment.__exit__()


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the round loop see clients of the in-process engine finish one by one, as real clients do."""
    monkeypatch.setattr("fedlora_simulations.in_process.TURN_S", 0.0)


@pytest.fixture(scope="session")
def mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database of MLflow without runs, to copy: it takes MLflow seconds to make one."""
    from fedlora_server.trackers.mlflow import QUIET

    os.environ.update(QUIET)
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file
