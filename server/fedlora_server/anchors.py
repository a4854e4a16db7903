"""The file in which the server keeps each client's last anchor, outside all run folders.

An anchor is 68 bytes that only its client can read (`fedlora.privacy.ledger.anchor`). From it the client learns, in any
later run, whether its own ledger was restored to an earlier state. So no anchor is ever removed. An anchor that cannot
be written is kept in memory while this process lives, and a warning is logged.
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
"""Seconds to wait while another server writes to the file; a write takes microseconds."""

_TABLE = f"""
    CREATE TABLE IF NOT EXISTS anchors (name TEXT PRIMARY KEY,
        sealed BLOB NOT NULL CHECK (typeof(sealed) = 'blob' AND length(sealed) = {ANCHOR_BYTES})) WITHOUT ROWID"""
_KEEP = "INSERT INTO anchors VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET sealed = excluded.sealed"


def default_place() -> Path | None:
    """Return the user's own file, in the XDG state folder. Without such a folder, log a warning and return None."""
    try:
        return user_folder("XDG_STATE_HOME", ".local", "state") / "anchors.sqlite"
    except ValueError as error:
        log.warning("Clients' anchors are kept while this server runs, and not beyond: %s.", error)
        return None


class Anchors:
    """The last anchor of each name. Any number of threads, and of servers of the same user, may use one file.

    A write reaches the disk soon after `keep` returns, not before (SQLite's synchronous = NORMAL). Waiting for the disk
    would cost every upload milliseconds. A power cut can lose the last write and leaves the anchor before it.

    Args:
        path: the SQLite file; made, with its folder, for the first anchor. None keeps anchors in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._unwritten: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._warned = False

    def newest(self, name: str) -> bytes:
        """Return the last anchor sent under this name; b"" if there is none."""
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
        """Replace the name's anchor by `sealed`."""
        with self._lock:
            self._unwritten[name] = sealed
            if self._path is not None:
                try:
                    self._open(self._path).execute(_KEEP, (name, sealed))
                    del self._unwritten[name]
                except (OSError, sqlite3.Error) as error:
                    self._warn(error)

    def close(self) -> None:
        """Close the file. A later call opens it again."""
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
            log.warning("%s cannot be used (%s). Clients' anchors, by which they notice that a ledger was restored, "
                        "are kept only while this server runs. Repair the file, or set XDG_STATE_HOME to a folder that "
                        "can be written to", self._path, error)
            self._warned = True
