"""The folder for a command's results: made, locked against other commands, and moved aside after a kill."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
"""Marker file that is in a folder while a command works in it. Only a command that was killed leaves it behind."""


@contextmanager
def claimed_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Within the block, hold a new or empty folder for the command's results.

    If a command that was killed has left results there, the folder is renamed first, so that the same command can be
    given again. If the folder is empty at the end, it is removed.

    Args:
        out: the folder (--out); None for runs/TIME-NAME.
        name: the NAME in runs/TIME-NAME.

    Raises:
        ValueError: the folder is not empty, cannot be made, or another command works in it.
    """
    folder = _made(out, name)
    with ExitStack() as held:
        held.callback(_remove_if_empty, folder)
        try:
            held.enter_context(retaken_folder(folder))
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be used: {error.strerror}; name another folder") from None
        yield folder


def check_free(out: Path) -> None:
    """Check that a command could claim the folder, without making it.

    Args:
        out: the folder (--out).

    Raises:
        ValueError: it is no folder, or it is not empty and no killed command has left it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder; name another one")
    if out.exists() and not (out / UNFINISHED).exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty; name another folder, so that no earlier result is lost")


@contextmanager
def retaken_folder(folder: Path) -> Iterator[Path]:
    """Within the block, hold an existing folder, such as that of a run that is resumed.

    Raises:
        ValueError: another command works in it.
        OSError: it cannot be written to.
    """
    lock = _hold(folder)
    try:
        (folder / UNFINISHED).touch()
        yield folder
    finally:
        with suppress(OSError):
            (folder / UNFINISHED).unlink()
        os.close(lock)


def _hold(folder: Path) -> int:
    """Lock the folder against other commands, until the returned file descriptor is closed.

    Raises:
        ValueError: another command works in it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another command works in {folder}; stop it first, or name another folder") from None
    return lock


def _made(out: Path | None, name: str) -> Path:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for number in itertools.count(1):
        folder = out or Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=out is not None)
            if (folder / UNFINISHED).exists():
                _move_aside(folder)
            taken = any(folder.iterdir())
        except OSError as error:
            if out is None and isinstance(error, FileExistsError):
                continue  # another command began in the same second
            raise ValueError(f"--out {folder} cannot be used: {error.strerror}; name another folder") from None
        if taken:
            raise ValueError(f"--out {folder} is not empty; name another folder, so that no earlier result is lost")
        return folder
    raise AssertionError


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _move_aside(folder: Path) -> None:
    """Rename a folder that a killed command has left, and make an empty one in its place."""
    lock = _hold(folder)
    try:
        folder = folder.absolute()
        aside = next(path for number in itertools.count(1)
                     if not (path := folder.with_name(f"{folder.name}-interrupted-{number}")).exists())
        folder.rename(aside)
        (aside / UNFINISHED).unlink()
        folder.mkdir()
    finally:
        os.close(lock)
