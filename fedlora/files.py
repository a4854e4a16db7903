"""Atomic replacement of files, and the limit on open files.

A file replaced here is never half written: a reader, or a restart after a crash, finds the old content or the new one.
"""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""Error numbers of conditions that can pass by themselves: a full disk or quota, too many open files."""


def replace_file(path: Path, content: bytes, mode: int = 0o600, *, make_folder: bool = True) -> None:
    """Replace a file's content atomically. The new content is on the disk when this returns.

    Args:
        path: the file to replace or create.
        content: the new content.
        mode: permissions of a newly created file, before the process's umask is applied.
        make_folder: create the file's folder if it does not exist.
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
        temporary.unlink(missing_ok=True)  # give the space back, in case the disk is full
        raise
    os.replace(temporary, path)
    to_disk(path.parent)


def append_to_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Append to a file, which is made if it does not exist. The content is on the disk when this returns.

    If the disk has no room for all of it, nothing is appended.

    Args:
        path: the file, in a folder that exists.
        content: what is appended.
        mode: permissions of a newly created file, before the process's umask is applied.
    """
    is_new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    try:
        whole, left = os.lseek(handle, 0, os.SEEK_END), memoryview(content)
        try:
            while left:
                left = left[os.write(handle, left):]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, whole)
            raise
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(handle)
    if is_new:
        to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_files_allowed(wanted: int) -> int:
    """Raise this process's limit on open files towards `wanted`, and return how many it may have open.

    Returns:
        `wanted` if the system allows that many, else the most that it allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    for count in (wanted, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
            return count
        except (ValueError, OSError):  # above the hard limit; macOS allows less than the limit that it reports
            continue
    return soft


def allow_open_files(count: int) -> None:
    """Let this process have `count` files open at once.

    Raises:
        ValueError: the system allows fewer.
    """
    if (allowed := open_files_allowed(count)) < count:
        raise ValueError(f"this many clients need {count} open files, and this system allows {allowed}; use fewer "
                         "--clients, or raise the hard limit of `ulimit -n`")
