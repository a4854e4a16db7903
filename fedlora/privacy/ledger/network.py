"""Detection of network file systems, on which a ledger is refused since locks and fsync cannot be relied on there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_NETWORK = frozenset((
    "9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "drvfs", "gfs", "gfs2", "glusterfs", "gpfs",
    "lustre", "macfuse", "ncpfs", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "osxfuse", "prl_fs", "pvfs2", "smb",
    "smb2", "smb3", "smbfs", "sshfs", "vboxsf", "vmhgfs", "webdav"))


def network_file_system(path: Path) -> str | None:
    """Return the type of the network file system that `path` is on, such as "nfs4"; None for a local disk.

    It is None too if the operating system does not list its mounts. Except on Linux this is a best effort.
    """
    try:
        if sys.platform == "linux":
            mounts = linux_mounts(Path("/proc/mounts").read_text())
        else:
            mounts = bsd_mounts(subprocess.run(["mount"], capture_output=True, text=True, timeout=10).stdout)
    except (OSError, subprocess.SubprocessError):
        return None
    kind = file_system(Path(path), mounts)
    return kind if kind is not None and is_network(kind) else None


def is_network(kind: str) -> bool:
    """Return whether a type of file system is a network one.

    Every file system in user space (fuse.*) counts as one: most are sshfs, rclone and the like.
    """
    return kind in _NETWORK or kind.startswith("fuse.")


def file_system(path: Path, mounts: list[tuple[str, str]]) -> str | None:
    """Return the type of the file system that `path` is on; None if no mount point is above it.

    The mount point with the most components counts; among equal ones the last mounted.

    Args:
        path: an existing or a future file.
        mounts: (mount point, type) of each mount, in the order of mounting.
    """
    resolved, best = Path(path).resolve(), None
    for point, kind in mounts:
        if resolved.is_relative_to(point) and (best is None or len(Path(point).parts) >= best[0]):
            best = (len(Path(point).parts), kind)
    return best[1] if best else None


def linux_mounts(text: str) -> list[tuple[str, str]]:
    r"""Return (mount point, type) for each line of /proc/mounts, where a blank in a mount point is written \040."""
    fields = [line.split() for line in text.splitlines()]
    return [(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f[1]), f[2]) for f in fields if len(f) >= 3]


def bsd_mounts(text: str) -> list[tuple[str, str]]:
    """Return (mount point, type) for each line that `mount` prints on macOS.

    Such a line reads "//host/share on /Volumes/a (smbfs, nodev)".
    """
    return [(m[1], m[2]) for m in re.finditer(r"^.* on (/.*?) \((\w+)[,)]", text, re.MULTILINE)]
