"""Small disks of a server's and its clients' own, that can be full or read-only: tmpfs in a mount namespace.

The namespace belongs to a process of this module. The processes under test enter it, and others on this machine see
nothing of it; `Disks.seen` is the way in from outside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from tests.chaos import namespaces
from tests.chaos.keepers import Keeper

BALLAST = ".ballast"
"""File that fills a disk."""


def why_none() -> str:
    """Return why there can be no such disks; "" if there can be."""
    return namespaces.why_none(namespaces.MOUNTS)


class Disks:
    """Disks that are mounted at folders.

    Args:
        folders: name of a disk → the folder, which must exist.
        megabytes: size of each disk.

    Attributes:
        mounts: the namespace's file, for `namespaces.enter`.
    """

    def __init__(self, folders: Mapping[str, Path], megabytes: int) -> None:
        self._keeper = Keeper(_keep, dict(folders), megabytes)
        self.mounts = f"/proc/{self._keeper.pid}/ns/mnt"
        self.close = self._keeper.close

    def seen(self, path: Path) -> Path:
        """Return the path by which a file on a disk is found from outside the namespace."""
        return Path(f"/proc/{self._keeper.pid}/root{path}")

    def do(self, disk: str, what: str) -> None:
        """Change a disk.

        Args:
            disk: its name.
            what: "fill" leaves no byte of room and "empty" gives it back. "close" makes the disk read-only for every
                file that is opened from then on, and "open" ends that. A file that is open stays writable, where a
                disk with an error would refuse that too: the kernel makes no file system read-only under open files.
        """
        self._keeper.ask((disk, what))


def _keep(pipe: Connection, folders: Mapping[str, Path], megabytes: int) -> Iterator[OSError | None]:
    namespaces.unshare(namespaces.MOUNTS)
    namespaces.mount("none", Path("/"), flags=namespaces.RECURSIVE | namespaces.PRIVATE)
    for folder in folders.values():
        namespaces.mount("tmpfs", folder, kind="tmpfs", data=f"size={megabytes}m,mode=700")
    yield None
    with contextlib.suppress(EOFError):
        while True:
            disk, what = pipe.recv()
            try:
                _do(folders[disk], what)
                yield None
            except OSError as error:
                yield error


def _do(folder: Path, what: str) -> None:
    if what == "fill":
        with (folder / BALLAST).open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):  # the last page's end, too, has no room for another file
                try:
                    while True:
                        file.write(bytes(size))
                        if size == 1:
                            break
                except OSError:
                    continue
    elif what == "empty":
        (folder / BALLAST).unlink()
    elif what == "close":
        namespaces.mount(str(folder), folder, flags=namespaces.BIND)
        namespaces.mount("none", folder, flags=namespaces.REMOUNT | namespaces.BIND | namespaces.READ_ONLY)
    else:
        namespaces.unmount(folder)
