from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny checkpoint of a kind, written once per session. Read it only."""
    folders: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tiny_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return folder_of
