"""Which clients may take part: `clients.toml`, one line `name = "fingerprint"` each, read again while a run lasts."""

from __future__ import annotations

import logging
import re
import threading
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fedlora.files import replace_file

log = logging.getLogger(__name__)

FILE = "clients.toml"
HEAD = ('# Clients that may take part: name = "SHA-256 of the public key". A running server reads this file again\n'
        "# when it changes. Take a line away to shut a client out; it is disconnected within seconds.\n\n")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class AllowList:
    """The clients that may take part, as the file says at the moment.

    An edit that cannot be read changes nothing and is said once: a slip of the hand must not let anybody in, or shut
    everybody out.

    Args:
        folder: holds clients.toml.

    Raises:
        ValueError: the file is missing or cannot be read as what it should be.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = threading.Lock()
        self._stamp = self._stamp_now()
        self._allowed = read(self.path)

    def allows(self, name: str, fingerprint: str) -> bool:
        """Return whether the client of this name may take part with the key of this fingerprint."""
        with self._lock:
            self._refresh()
            return self._allowed.get(name) == fingerprint

    def __len__(self) -> int:
        with self._lock:
            self._refresh()
            return len(self._allowed)

    def _refresh(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._allowed = read(self.path)
        except ValueError as error:
            log.warning("%s. The list from before the change stays in force", error)

    def _stamp_now(self) -> tuple[int, int, int]:
        try:
            status = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_mtime_ns, status.st_size, status.st_ino)


def read(path: Path) -> Mapping[str, str]:
    """Read an allow list: name → fingerprint.

    Raises:
        ValueError: the file is missing, is no TOML, or a line is not `name = "64 hexadecimal digits"`.
    """
    try:
        entries = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the list of allowed clients {path} cannot be read: {error}") from None
    for name, value in entries.items():
        if not isinstance(value, str) or not _FINGERPRINT.fullmatch(value):
            raise ValueError(f"{path}: the entry of {name!r} is not the SHA-256 of a public key, 64 hexadecimal digits")
    return entries


def write(path: Path, entries: Mapping[str, str]) -> None:
    """Replace an allow list; its entries are sorted by name."""
    lines = "".join(f'{_quoted(name)} = "{entries[name]}"\n' for name in sorted(entries))
    replace_file(path, (HEAD + lines).encode(), mode=0o644)


def _quoted(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
