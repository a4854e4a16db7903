"""The folder that a command leaves its results in."""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
"""In a folder while a command works in it: only a kill leaves it behind."""


@contextmanager
def claimed_folder(out: Path | None, name: str) -> Iterator[Path]:
    """--out, or runs/<time>-<name>, made and empty, for as long as the command lasts.

    What a command that was killed has left there is moved aside, so that the same command can be given again. A folder
    in which nothing is left is taken away.

    Raises:
        ValueError: it is not empty, or cannot be made, or another command works in it.
    """
    folder = _made(out, name)
    with ExitStack() as held:
        held.callback(_remove_if_empty, folder)
        try:
            held.enter_context(retaken_folder(folder))
        except OSError as error:
            raise ValueError(f"--out {folder} cannot be used: {error.strerror}; name another folder") from None
        yield folder


@contextmanager
def retaken_folder(folder: Path) -> Iterator[Path]:
    """The folder of a run that is taken up, for as long as the command lasts.

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
    """Keep other commands from this folder, until the descriptor that is returned is closed.

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
                continue  # another command was given in the same second
            raise ValueError(f"--out {folder} cannot be used: {error.strerror}; name another folder") from None
        if taken:
            raise ValueError(f"--out {folder} is not empty; name another folder, so that no earlier result is lost")
        return folder
    raise AssertionError


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _move_aside(folder: Path) -> None:
    """Rename what a killed command has left, and make the folder anew."""
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
