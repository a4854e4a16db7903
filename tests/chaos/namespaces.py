"""Linux namespaces and mounts, by the C library's own calls: they belong to the processes that ask for them alone.

Nothing is named, bound or written anywhere, so that a namespace is gone with the last process in it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

NETWORK, MOUNTS = 0x40000000, 0x00020000  # CLONE_NEWNET, CLONE_NEWNS
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18  # MS_…
_DETACH = 2  # MNT_DETACH

_C = ctypes.CDLL(None, use_errno=True)


def unshare(kinds: int) -> None:
    """Move this process, which must have one thread, into new namespaces of these kinds."""
    _check(_C.unshare(kinds))


def enter(namespace: str) -> None:
    """Move this process, which must have one thread, into a namespace, given by a file in /proc."""
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        _check(_C.setns(descriptor, 0))
    finally:
        os.close(descriptor)


def mount(what: str, where: Path, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system, or change a mount."""
    _check(_C.mount(what.encode(), str(where).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()))


def unmount(where: Path) -> None:
    """Take the uppermost mount at a folder away, even if files on it are open."""
    _check(_C.umount2(str(where).encode(), _DETACH))


def why_none(kinds: int) -> str:
    """Return why this process cannot have namespaces of its own; "" if it can."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid():
        return "namespaces need root"
    tried = subprocess.run([sys.executable, "-m", __name__, str(kinds)], capture_output=True, text=True)
    return f"this machine gives no namespaces ({tried.stdout.strip()})" if tried.returncode else ""


def _check(result: int) -> None:
    if result:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    try:
        unshare(int(sys.argv[1]))
    except OSError as refused:
        sys.exit(print(refused.strerror) or 1)
