"""Files that are replaced as a whole: whoever reads, and whatever crashes, finds the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Atomically put `content` in place of the file; it is on the disk when this returns.

    Args:
        path: its folder is made if need be.
        mode: of a file that is made, less the process's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)
    os.replace(temporary, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Make a file's content last, or a folder's created, renamed and removed names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
