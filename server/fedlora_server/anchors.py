"""What clients have this server keep for them: the last anchor of each name, in one file outside of all run folders.

An anchor is 68 bytes that only its client can read (`fedlora.privacy.ledger.anchor`). Nothing here is ever removed:
a client is to learn from it that its own ledger was put back to an earlier state, in whatever run and after however
long. An anchor that cannot be written is a warning, and kept while this process lives.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from pathlib import Path

from fedlora.places import user_folder
from fedlora.plan import ANCHOR_BYTES

log = logging.getLogger(__name__)

WAIT_S = 1.0
"""How long another server's write is waited for; each takes microseconds."""

_TABLE = f"""
    CREATE TABLE IF NOT EXISTS anchors (name TEXT PRIMARY KEY,
        sealed BLOB NOT NULL CHECK (typeof(sealed) = 'blob' AND length(sealed) = {ANCHOR_BYTES})) WITHOUT ROWID"""
_KEEP = "INSERT INTO anchors VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed"


def default_place() -> Path | None:
    """The user's, by the XDG base directories; None, and a warning, where this user has none."""
    try:
        return user_folder("XDG_STATE_HOME", ".local", "state") / "anchors.sqlite"
    except ValueError as error:
        log.warning("Clients' anchors are kept while this server runs, and no longer: %s.", error)
        return None


class Anchors:
    """The anchors of all names; any number of threads, and of servers of this user, may use it.

    A write is on the disk soon after, not at once (synchronous = NORMAL): one that a power cut loses leaves the anchor
    before it, and waiting for the disk would cost every upload milliseconds.

    Args:
        path: the file; made, with its folder, for the first anchor. None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._unwritten: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._warned = False

    def newest(self, name: str) -> bytes:
        """The last anchor that came under this name; b"" if none did."""
        with self._lock:
            if name in self._unwritten or self._path is None or not self._path.exists():
                return self._unwritten.get(name, b"")
            try:
                found = self._open(self._path).execute("SELECT sealed FROM anchors WHERE name = ?", (name,)).fetchone()
                return bytes(found[0]) if found else b""
            except (OSError, sqlite3.Error) as error:
                self._warn(error)
                return b""

    def keep(self, name: str, sealed: bytes) -> None:
        """Put it in place of the one before."""
        with self._lock:
            self._unwritten[name] = sealed
            if self._path is not None:
                try:
                    self._open(self._path).execute(_KEEP, (name, sealed))
                    del self._unwritten[name]
                except (OSError, sqlite3.Error) as error:
                    self._warn(error)

    def close(self) -> None:
        """Let go of the file, until it is used again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _open(self, path: Path) -> sqlite3.Connection:
        if self._db is None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(path, timeout=WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute(_TABLE)
            except sqlite3.Error:
                db.close()
                raise
            self._db = db
        return self._db

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log.warning("%s cannot be used (%s), so what clients have this server keep against restored ledgers lasts "
                        "only as long as it runs. See to the file, or set XDG_STATE_HOME to a folder that can be "
                        "written", self._path, error)
            self._warned = True
