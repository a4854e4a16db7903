"""Folders that are handed on: written completely or not at all, and never over somebody else's files."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fedlora
from fedlora.files import to_disk
from fedlora.plan import RunPlan

ABOUT = "fedlora.json"
"""File in every folder that is handed on: the run and the base model that it comes from."""

WAIT_S = 60.0
"""Seconds to wait for another command that writes the same folder, as where a run ends while it is exported."""


def about(plan: RunPlan, round: int) -> dict[str, object]:
    """Return the content of fedlora.json.

    Args:
        plan: the run's plan.
        round: the last finished round.
    """
    model = plan.model
    return {"fedlora": fedlora.__version__, "run": plan.run_id, "round": round, "task": plan.task,
            "base": {"name": model.title, "weights_sha256": model.weights_sha256,
                     "config_sha256": model.config_sha256, "tokenizer_sha256": model.tokenizer_sha256}}


def check_replaceable(folder: Path, run_id: str, *, own: bool = False) -> None:
    """Check that a folder is free, or holds what an earlier command wrote there for the same run.

    Args:
        folder: the folder to write.
        run_id: the run.
        own: whether the folder is a part of the run's own folder, so that its content is always this run's.

    Raises:
        ValueError: the folder holds something else, or is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is not a folder; name another place")
    if own or not folder.exists() or not any(folder.iterdir()):
        return
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"{folder} is not empty, and this command did not write what is there; name another folder, "
                         "so that nothing is lost") from None
    if found != run_id:
        raise ValueError(f"{folder} holds what was exported from run {found}, and this is run {run_id}; name another "
                         "folder, so that nothing is lost")


@contextmanager
def whole_folder(folder: Path, plan: RunPlan, round: int) -> Iterator[Path]:
    """Within the block, fill a new folder; afterwards it takes the place of `folder`.

    A kill leaves the old folder or the new one, never a part of one. What it leaves beside them,
    ".NAME.unfinished", is taken away by the next call.

    Args:
        folder: the folder to make or to replace (`check_replaceable`).
        plan: the run's plan.
        round: the last finished round.

    Raises:
        ValueError: another command writes the same folder, and is not done after `WAIT_S`.
        OSError: the folder cannot be written. Then the old one is still there.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.unfinished")
    lock = _hold(made, folder)
    try:
        _empty(made)
        yield made
        (made / ABOUT).write_text(json.dumps(about(plan, round), indent=1) + "\n", encoding="utf-8")
        for path in sorted(made.rglob("*"), reverse=True):
            to_disk(path)
        to_disk(made)
        _put(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _hold(made: Path, folder: Path) -> int:
    """Make the folder under way, and lock it until the returned file descriptor is closed."""
    deadline = time.monotonic() + WAIT_S
    while True:
        with suppress(FileExistsError):
            made.mkdir()
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:  # who held it has just renamed it
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), made.stat()):
                return lock
        os.close(lock)
        if time.monotonic() >= deadline:
            raise ValueError(f"another command writes {folder} now; wait for it, or name another folder")
        time.sleep(0.1)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _put(made: Path, folder: Path) -> None:
    """Rename `made` to `folder`. What is there is renamed first and then removed."""
    old = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    made.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
