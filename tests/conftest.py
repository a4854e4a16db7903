import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models only lose by more threads

from tests.tiny import tiny_checkpoint

# a shell script's background jobs, and what they start, ignore Ctrl-C; tests send it to their processes
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """More than there are cores: tests of real processes wait for them most of the time."""
    return (os.cpu_count() or 1) + 2


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint of a kind, written once per session. Read it only."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tiny_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder_of
