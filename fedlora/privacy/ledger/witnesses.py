"""Checks of a ledger against its witnesses, which notice a ledger that was lost, replaced or put back.

A witness is a record, outside of the ledger, of how far the ledger had come. There are two kinds: a file beside the
data, written before each update leaves, and the anchor that a server keeps and hands back.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fedlora.privacy.ledger.hash_chain import HashChain
from fedlora.privacy.ledger.lifetime_budget import Book, LedgerError
from fedlora.privacy.ledger.witness import Witness, read_witness, witnesses_in, write_witness


class Witnesses:
    """The witnesses of one ledger.

    Args:
        chain: the ledger's chain of events.
        ledger: the ledger's file, for messages; None in memory.
        give_up: the owner's --new-ledger: go on if a witness contradicts the ledger, and record a permanent mark.
    """

    def __init__(self, chain: HashChain, ledger: Path | None, *, give_up: bool) -> None:
        self._chain, self._ledger, self._gives_up = chain, ledger, give_up
        self._files: dict[str, Path] = {}

    def watch(self, dataset: str, file: Path) -> None:
        """Check a data set's witness file, and write it before each update that leaves from now on.

        Raises:
            LedgerError: the witness is missing, names another ledger, or has seen more than this ledger holds.
        """
        path = self._files[dataset] = Path(file).absolute()
        with self._chain.transaction() as book:
            seen, wrong = self._look(book, path, dataset)
            if wrong:
                self._give_up(book, seen, wrong)
        if wrong:
            with self._chain.transaction() as book:
                self._write(book, dataset)

    def check_folder(self, folder: Path) -> None:
        """Check every witness file in a folder of data, whichever data set it was written for.

        This recognises the data even if the ledger and the policy that named them were lost together.

        Raises:
            LedgerError: a witness names another ledger or has seen more than this ledger holds, and no mark records
                that the owner accepted this.
        """
        with self._chain.transaction() as book:
            for path in witnesses_in(folder):
                seen, wrong = self._look(book, path)
                if wrong and asdict(seen) not in book.marks:
                    self._give_up(book, seen, wrong)

    def check_anchor(self, rows: int, head: str) -> None:
        """Check the state of this ledger that a server kept.

        Args:
            rows: number of rows that the ledger had then.
            head: the chain's hash after them, 64 hexadecimal digits.

        Raises:
            LedgerError: the ledger does not have these rows, and no mark records that the owner accepted this.
        """
        with self._chain.transaction() as book:
            seen = Witness("", book.ledger["ledger_id"], rows, head)
            if self._chain.row(rows) != head and asdict(seen) not in book.marks:
                self._give_up(book, seen, f"{self._chain.name}, with {book.rows} rows, is an older copy or was "
                                          f"changed: the server keeps its anchor of {rows} rows, so updates have left "
                                          f"that this ledger does not know. {self._remedy}")

    def testify(self, book: Book, dataset: str) -> None:
        """Check and write a data set's witness, right before an update leaves.

        This happens within the ledger's transaction, so that of two processes none can write an older witness over a
        newer one.

        Raises:
            LedgerError: the witness contradicts the ledger, or cannot be written.
        """
        if dataset in self._files:
            _, wrong = self._look(book, self._files[dataset], dataset)
            if wrong:
                raise LedgerError(wrong)
            self._write(book, dataset)

    def _look(self, book: Book, path: Path, dataset: str | None = None) -> tuple[Witness, str]:
        """Return what a witness file has seen, and how that contradicts this ledger ("" if it does not)."""
        remedy = self._remedy
        try:
            seen = read_witness(path)
        except LedgerError as error:
            return Witness(dataset or path.name, "unreadable", 0, ""), str(error)
        if seen is None:
            left = any(charge.dataset == dataset and charge.state == "released" for charge in book.charges.values())
            missing = (f"{path}, the ledger's witness, is missing, though updates made from dataset {dataset!r} have "
                       f"left this machine. Restore it, or name its folder as `witness` in policy.toml. {remedy}")
            return Witness(dataset or path.name, "missing", 0, ""), missing if left else ""
        if seen.ledger_id != book.ledger["ledger_id"]:
            return seen, (f"{path}, the ledger's witness, was written by another ledger, {seen.ledger_id}, with "
                          f"{seen.rows} rows; {self._chain.name} is {book.ledger['ledger_id']}, with {book.rows} rows. "
                          f"{remedy}")
        if dataset not in (None, seen.dataset):
            raise LedgerError(f"{path}, the ledger's witness, belongs to dataset {seen.dataset!r}, not to {dataset!r}; "
                              "correct the ids or the `witness` folders in policy.toml")
        if self._chain.row(seen.rows) != seen.head:
            return seen, (f"{self._chain.name}, with {book.rows} rows, is an older copy or was changed: {path}, its "
                          f"witness, has seen {seen.rows} rows that it does not hold. {remedy}")
        return seen, ""

    @property
    def _remedy(self) -> str:
        return (f"Restore {self._ledger} as it was. Or use --new-ledger: spending that the ledger does not know is "
                "then not counted, and it says so for ever")

    def _give_up(self, book: Book, seen: Witness, wrong: str) -> None:
        """With --new-ledger, record a permanent mark of what a witness has seen; otherwise raise LedgerError."""
        if not self._gives_up:
            raise LedgerError(wrong)
        if asdict(seen) not in book.marks:
            self._chain.append("mark", **asdict(seen))

    def _write(self, book: Book, dataset: str) -> None:
        if self._chain.trial:
            return
        write_witness(self._files[dataset], Witness(dataset, book.ledger["ledger_id"], book.rows, book.head))
