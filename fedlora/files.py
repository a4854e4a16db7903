"""Files that are replaced as a whole: whoever reads, and whatever crashes, finds the old one or the new one; and how
many may be open.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""Faults of a machine that end by themselves: a full disk, and too many open files."""


def replace_file(path: Path, content: bytes, mode: int = 0o600, *, make_folder: bool = True) -> None:
    """Atomically put `content` in place of the file; it is on the disk when this returns.

    Args:
        mode: of a file that is made, less the process's umask.
        make_folder: whether to make the file's folder if need be.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
    except OSError as error:
        error.filename = error.filename or str(path)
        temporary.unlink(missing_ok=True)  # a full disk is to have its space again
        raise
    os.replace(temporary, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Make a file's content last, or a folder's created, renamed and removed names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_files_allowed(wanted: int) -> int:
    """How many files this process may have open, once so many as the system allows, up to `wanted`, are asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    for count in (wanted, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
            return count
        except (ValueError, OSError):  # above the hard limit; or macOS, which allows less than it says
            continue
    return soft


def allow_open_files(count: int) -> None:
    """Let this process have so many files open.

    Raises:
        ValueError: the system does not allow it.
    """
    if (allowed := open_files_allowed(count)) < count:
        raise ValueError(f"so many clients need {count} open files and this system allows {allowed}; use fewer "
                         "--clients, or have the hard limit of `ulimit -n` raised")
