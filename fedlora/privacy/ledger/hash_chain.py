"""The ledger's storage: an append-only, hash-chained list of events in one SQLite file.

A row is (sequence number, canonical JSON, SHA-256 over the previous row's hash and this text). The last row's hash is
the chain's head. `Book` applies the rows in order and checks each of them: all rows when the file is opened, and new
ones at the start of each transaction. SQLite runs in WAL mode with synchronous=FULL, so that a committed transaction is
on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fedlora.files import to_disk
from fedlora.privacy.ledger.lifetime_budget import Book, LedgerError, chained
from fedlora.privacy.ledger.network import network_file_system

FORMAT = 3
"""Format of new ledgers.

Format 1 recorded neither where data are nor a run's relation and accountant. Such a ledger is read with the relation
and accountant that all runs had then, and is continued in place. A program that knows only format 1 takes the first new
row for damage, and stops. Format 2 had no runs with secure sums and no rosters. Such a ledger is continued in place
too; a program that knows only format 2 reads it on until it holds such a run."""
READABLE = (1, 2, 3)
"""Formats that this version reads and continues."""
WAIT_S = 30.0
"""Seconds to wait for another process's transaction; one takes milliseconds."""

_TABLES = """
    CREATE TABLE events (sequence INTEGER PRIMARY KEY, event TEXT NOT NULL, sha256 TEXT NOT NULL);
    CREATE TABLE fingerprints (dataset TEXT, digest BLOB, PRIMARY KEY (dataset, digest)) WITHOUT ROWID;
    CREATE INDEX fingerprints_by_digest ON fingerprints (digest);
"""

_LOST = ("restore it from a backup, or use --new-ledger: what was spent before is then not counted, and the new ledger "
         "says so for ever")


class HashChain:
    """One open ledger file, as a chain of events.

    Args:
        path: the SQLite file, created if it does not exist; None for a chain in memory.
        simulated: whether the ledger is a simulation's; an existing file must be of the same kind.
        new: move an existing file aside and begin another.
        trial: work on a copy in memory of what the file holds now, or of a new ledger; the disk is not written to.
        clock: returns seconds since 1970, for the events' times.

    Attributes:
        path: the file; None in memory.
        trial: as in the arguments.
        db: the connection. Use it within `transaction` only.
        mutex: held throughout a transaction, so that threads of this process take turns.
        name: the ledger's name in messages.

    Raises:
        LedgerError: the file is damaged, of the other kind, on a network file system or not writable.
    """

    def __init__(self, path: Path | None, *, simulated: bool, new: bool, clock: Callable[[], float],
                 trial: bool = False) -> None:
        self.path, self.trial = path, trial
        self._inode: int | None = None
        self.name = "the simulated ledger in memory" if path is None else f"the ledger {path}"
        self.mutex = threading.RLock()
        self._book = Book()
        self._clock, self._pid = clock, os.getpid()
        beginning = {"ledger_id": secrets.token_hex(16), "simulated": simulated, "anew": new, "format": FORMAT}
        try:
            self.db = self._open(beginning, simulated, new)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{self.name} cannot be opened ({error}); make it readable and writable, or {_LOST}"
                              ) from error
        try:
            with self.transaction("DEFERRED") as book:
                about = book.ledger
            if about.get("format") not in READABLE:
                raise LedgerError(f"{self.name} is no ledger of a format that this version reads (1 to {FORMAT}); if a "
                                  f"newer FedLoRA wrote it, use that one; else {_LOST}")
            if about["simulated"] != simulated:
                found, wanted = (("real", "simulated")[kind] for kind in (about["simulated"], simulated))
                raise LedgerError(f"{self.name} is a {found} ledger and a {wanted} one is needed; the two are never "
                                  "mixed. Name another path")
        except BaseException:
            self.db.close()
            raise

    def _open(self, beginning: Mapping[str, object], simulated: bool, new: bool) -> sqlite3.Connection:
        text = _canonical(1, "ledger", self._clock(), beginning)
        if self.path is None:
            return _in_memory(text)
        remote = None if simulated else network_file_system(self.path)
        if remote:
            raise LedgerError(f"{self.name} is on a network file system ({remote}), where locks and writes cannot be "
                              "relied on; name a folder on a local disk")
        if self.trial:
            return _copied(self.path) if self.path.exists() and not new else _in_memory(text)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if new:
            _move_aside(self.path)
        if not self.path.exists():
            self._make(self.path, text)
        self._inode = self.path.stat().st_ino
        db = _connect(self.path.as_uri() + "?mode=rw", uri=True)
        db.execute(f"PRAGMA synchronous = {'OFF' if simulated else 'FULL'}")
        db.execute("PRAGMA fullfsync = ON")  # macOS: through the drive's own cache
        if db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            db.close()
            raise LedgerError(f"{self.name} is not in SQLite's WAL mode; {_LOST}")
        return db

    def _make(self, path: Path, text: str) -> None:
        """Make a new ledger at `path` with `text` as its first event.

        It is built under another name, synchronised to the disk by SQLite, then linked to its own name, and the folder
        is synchronised last. So nobody ever sees half a ledger, whichever process dies or is faster.
        """
        if beside(path, "-wal").exists():
            raise LedgerError(f"{self.name} is missing, but a part of it, {path.name}-wal, is still there; {_LOST}")
        temporary = beside(path, f".{secrets.token_hex(8)}.new")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o600))
        try:
            with contextlib.closing(_connect(temporary)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                _begin(db, text)
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
        finally:
            temporary.unlink()
        to_disk(path.parent)

    @contextlib.contextmanager
    def transaction(self, mode: str = "IMMEDIATE") -> Iterator[Book]:
        """Open a transaction, and yield the state of the ledger as it is on the disk.

        When the block ends, all that it appended is on the disk. If it raises, none of it is.

        Args:
            mode: "IMMEDIATE" to write, which excludes other writers; "DEFERRED" only to read.

        Raises:
            LedgerError: the file is damaged, was replaced, or cannot be read or written.
        """
        with self.mutex:
            try:
                self.check_process()
                if self.path is not None and self._inode is not None and self.path.stat().st_ino != self._inode:
                    raise LedgerError(f"{self.name} was replaced while it was open; if you did not replace it, restore "
                                      "it from a backup, then restart")
                self.db.execute(f"BEGIN {mode}")
                self._catch_up()
                yield self._book
                self.db.execute("COMMIT")
            except BaseException as error:
                self._book = Book()  # the old one may hold events that were not written; the next one reads all anew
                with contextlib.suppress(sqlite3.Error):
                    if self.db.in_transaction:
                        self.db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error | OSError):
                    raise LedgerError(f"{self.name} cannot be read or written ({error}), so nothing may be trained or "
                                      "sent; make room on the disk or mend it, or restore the ledger from a "
                                      "backup") from error
                raise

    def check_process(self) -> None:
        """Raise LedgerError in a fork of the process that opened the chain, where a charge would have two owners."""
        if os.getpid() != self._pid:
            raise LedgerError(f"{self.name} was opened by the process that forked this one; open it again")

    def _catch_up(self) -> None:
        """Apply the rows that other processes have added, after checking that the last known row is unchanged."""
        book = self._book
        if book.rows and self.row(book.rows) != book.head:
            raise LedgerError(f"{self.name} lost or changed row {book.rows} while it was open; {_LOST}")
        try:
            for row in self.db.execute("SELECT sequence, event, sha256 FROM events WHERE sequence > ? "
                                       "ORDER BY sequence", (book.rows or -2**63,)):
                book.apply(*row)
        except LedgerError as error:
            raise LedgerError(f"{self.name} is damaged: {error}. To go on, {_LOST}") from error

    def row(self, sequence: int) -> str | None:
        """Return the chain's hash after a row, 64 hexadecimal digits; None if there is no such row."""
        found = self.db.execute("SELECT sha256 FROM events WHERE sequence = ?", (sequence,)).fetchone()
        return found[0] if found else None

    def append(self, kind: str, **body: object) -> int:
        """Append an event and return its sequence number. Call this within a transaction only.

        Args:
            kind: names the method of `Book` that applies the event.
            body: the event's fields, as plain JSON values.
        """
        book = self._book
        text = _canonical(book.rows + 1, kind, self._clock(), body)
        row = (book.rows + 1, text, chained(book.head, text))
        self.db.execute("INSERT INTO events VALUES (?, ?, ?)", row)
        book.apply(*row)
        return row[0]


def beside(path: Path, suffix: str) -> Path:
    """Return the path beside `path` whose name is the same with a suffix appended."""
    return path.with_name(path.name + suffix)


def take_lock(path: Path) -> int | None:
    """Lock a file, and return the open handle, which holds the lock until it is closed or this process ends.

    Returns:
        None if another handle has the lock.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _move_aside(path: Path) -> None:
    """Keep an old ledger under another name. Raise LedgerError while a process holds a run of it."""
    for file in beside(path, "-runs").glob("*"):
        handle = take_lock(file)
        if handle is None:
            raise LedgerError(f"the ledger {path} is in use by another process; stop that one before --new-ledger")
        os.close(handle)
    aside = next(p for n in range(1, 10**6) if not (p := beside(path, f".replaced-{n}")).exists())
    for suffix in ("-wal", "-shm", "-key", ""):
        with contextlib.suppress(FileNotFoundError):
            beside(path, suffix).rename(beside(aside, suffix))
    to_disk(path.parent)


def _connect(database: str | Path, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(database, timeout=WAIT_S, isolation_level=None, check_same_thread=False, uri=uri)


def _in_memory(text: str) -> sqlite3.Connection:
    db = _connect(":memory:")
    _begin(db, text)
    return db


def _copied(path: Path) -> sqlite3.Connection:
    """Return a copy in memory of the ledger at `path`, as its last transaction left it."""
    db = _connect(":memory:")
    with contextlib.closing(_connect(path.as_uri() + "?mode=rw", uri=True)) as source:
        source.backup(db)
    return db


def _begin(db: sqlite3.Connection, text: str) -> None:
    """Create the tables and add the first event, in one transaction."""
    db.executescript(f"BEGIN; {_TABLES}")
    db.execute("INSERT INTO events VALUES (1, ?, ?)", (text, chained("", text)))
    db.execute("COMMIT")


def _canonical(sequence: int, kind: str, now: float, body: Mapping[str, object]) -> str:
    """Return an event's one spelling, which is hashed: sorted keys, no spaces, ASCII."""
    return json.dumps({"sequence": sequence, "kind": kind, "time": float(now), "body": body}, sort_keys=True,
                      separators=(",", ":"), allow_nan=False)
