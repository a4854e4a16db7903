"""The register of fingerprints, which tells which data sets of a ledger share records, from keyed hashes alone."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from pathlib import Path

from fedlora.files import replace_file
from fedlora.privacy.ledger.hash_chain import HashChain, beside
from fedlora.privacy.ledger.lifetime_budget import Book, LedgerError

DIGEST_BYTES = 16
"""Size of a fingerprint."""


class OverlapIndex:
    """The fingerprints of all data sets of one ledger, in a table beside its events.

    The events state the number of each data set's fingerprints and a hash over them, so that a changed table is
    noticed.

    Args:
        chain: the ledger's chain of events.
        ledger: the ledger's file, beside which the key is; None in memory.
    """

    def __init__(self, chain: HashChain, ledger: Path | None) -> None:
        self._chain, self._file = chain, None if ledger is None else beside(ledger, "-key")
        self._memory_key = secrets.token_bytes(32)

    def key(self) -> bytes:
        """Return the 32-byte key of the fingerprints, made at the first call (file mode 0600).

        The key is on the disk before the ledger records its SHA-256.

        Raises:
            LedgerError: the key is missing or is another one.
        """
        if self._file is None:
            return self._memory_key
        with self._chain.transaction() as book:
            if book.key_sha256 is None and not self._file.exists():
                if self._chain.trial:
                    return self._memory_key
                replace_file(self._file, secrets.token_bytes(32))
            key = self._file.read_bytes() if self._file.exists() else b""
            sha256 = hashlib.sha256(key).hexdigest()
            if len(key) != 32 or book.key_sha256 not in (None, sha256):
                raise LedgerError(f"{self._file} is missing or is not the key with which this ledger began, so data "
                                  "sets that share records could not be recognised; restore it from a backup")
            if book.key_sha256 is None:
                self._chain.append("key", sha256=sha256)
            return key

    def add(self, dataset: str, digests: Iterable[bytes], place: str | None) -> None:
        """Add the fingerprints of a data set's records. Fingerprints that were added before are kept.

        Args:
            dataset: the owner's id of the data set.
            digests: 16 bytes each.
            place: where the data are; None leaves that unknown.

        Raises:
            LedgerError: the stored fingerprints were changed.
            ValueError: a digest does not have 16 bytes.
        """
        rows = sorted({(dataset, bytes(digest)) for digest in digests})
        if any(len(digest) != DIGEST_BYTES for _, digest in rows):
            raise ValueError(f"a fingerprint has {DIGEST_BYTES} bytes")
        with self._chain.transaction() as book:
            self.check(book, dataset)
            if place is not None and book.places.get(dataset) != place:
                self._chain.append("data", dataset=dataset, place=place)
            before = self._chain.db.total_changes
            self._chain.db.executemany("INSERT OR IGNORE INTO fingerprints VALUES (?, ?)", rows)
            if self._chain.db.total_changes == before:
                return
            shares = [name for name, in self._chain.db.execute(
                "SELECT DISTINCT other.dataset FROM fingerprints AS mine JOIN fingerprints AS other USING (digest) "
                "WHERE mine.dataset = ? AND other.dataset <> mine.dataset ORDER BY 1", (dataset,))]
            records, sha256 = self._held(dataset)
            self._chain.append("register", dataset=dataset, records=records, sha256=sha256, shares=shares)

    def check(self, book: Book, *datasets: str) -> None:
        """Check the fingerprints of these and of every registered data set against the events, within a transaction.

        Args:
            book: the ledger's state in this transaction.
            datasets: ids of data sets that need not be registered yet.

        Raises:
            LedgerError: the fingerprints were changed.
        """
        if any(self._held(name) != book.registered.get(name, self._held(""))
               for name in {*datasets, *book.registered}):
            raise LedgerError(f"the fingerprints in {self._chain.name} were changed; restore it from a backup")

    def _held(self, dataset: str) -> tuple[int, str]:
        """Return the number of a data set's fingerprints, and the SHA-256 over them in sorted order."""
        found = [digest for digest, in self._chain.db.execute(
            "SELECT digest FROM fingerprints WHERE dataset = ? ORDER BY digest", (dataset,))]
        return len(found), hashlib.sha256(b"".join(found)).hexdigest()
