"""Witnesses against a ledger: what they have seen is checked, and they are written before each update leaves.

They are files beside the data, and the anchor that a server gives back.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fedlora.privacy.ledger.hash_chain import HashChain
from fedlora.privacy.ledger.lifetime_budget import Book, LedgerError
from fedlora.privacy.ledger.witness import Witness, read_witness, witnesses_in, write_witness


class Witnesses:
    """The witness files of one ledger's datasets.

    Args:
        chain: the ledger's.
        ledger: its file, for errors; None in memory.
        give_up: --new-ledger: go on where a witness contradicts the ledger, and mark that for ever.
    """

    def __init__(self, chain: HashChain, ledger: Path | None, *, give_up: bool) -> None:
        self._chain, self._ledger, self._gives_up = chain, ledger, give_up
        self._files: dict[str, Path] = {}

    def watch(self, dataset: str, file: Path) -> None:
        """Check a dataset's witness, and write it before each update leaves from now on.

        Raises:
            LedgerError: it is missing, names another ledger, or has seen more than this ledger holds.
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
        """Check every witness in a folder of data, whichever dataset it was written for.

        Data are so recognised where the ledger and the policy that named them were lost together.

        Raises:
            LedgerError: one names another ledger, or has seen more than this ledger holds, and no mark says so.
        """
        with self._chain.transaction() as book:
            for path in witnesses_in(folder):
                seen, wrong = self._look(book, path)
                if wrong and asdict(seen) not in book.marks:
                    self._give_up(book, seen, wrong)

    def check_anchor(self, rows: int, head: str) -> None:
        """Check what a server kept of this ledger, by the rows and the head that it had then.

        Raises:
            LedgerError: the ledger does not hold them, and no mark says so.
        """
        with self._chain.transaction() as book:
            seen = Witness("", book.ledger["ledger_id"], rows, head)
            if self._chain.row(rows) != head and asdict(seen) not in book.marks:
                self._give_up(book, seen, f"updates have left that {self._chain.name}, with {book.rows} rows, does not "
                                          f"know: the server keeps its anchor of {rows} rows, so it is an older copy, "
                                          f"or was changed. {self._remedy}")

    def testify(self, book: Book, dataset: str) -> None:
        """Right before an update leaves, within the transaction, so that witnesses of two processes never go back.

        Raises:
            LedgerError: the witness contradicts the ledger, or cannot be written.
        """
        if dataset in self._files:
            _, wrong = self._look(book, self._files[dataset], dataset)
            if wrong:
                raise LedgerError(wrong)
            self._write(book, dataset)

    def _look(self, book: Book, path: Path, dataset: str | None = None) -> tuple[Witness, str]:
        """What a witness has seen, and how that contradicts this ledger; "" where it does not."""
        remedy = self._remedy
        try:
            seen = read_witness(path)
        except LedgerError as error:
            return Witness(dataset or path.name, "unreadable", 0, ""), str(error)
        if seen is None:
            left = any(charge.dataset == dataset and charge.state == "released" for charge in book.charges.values())
            missing = (f"{path} is missing, though updates made from dataset {dataset!r} have left this machine. "
                       f"Restore it, or name its place as `witness` in policy.toml. {remedy}")
            return Witness(dataset or path.name, "missing", 0, ""), missing if left else ""
        if seen.ledger_id != book.ledger["ledger_id"]:
            return seen, (f"{path} was written by another ledger, {seen.ledger_id}, with {seen.rows} rows; "
                          f"{self._chain.name} is {book.ledger['ledger_id']}, with {book.rows}. {remedy}")
        if dataset not in (None, seen.dataset):
            raise LedgerError(f"{path} belongs to dataset {seen.dataset!r}, not to {dataset!r}; correct policy.toml")
        if self._chain.row(seen.rows) != seen.head:
            return seen, (f"{path} has seen {seen.rows} rows that {self._chain.name}, with {book.rows}, does not "
                          f"hold: it is an older copy, or was changed. {remedy}")
        return seen, ""

    @property
    def _remedy(self) -> str:
        return (f"Restore {self._ledger} as it was, or use --new-ledger and count what was spent before as lost "
                "budget; the mark stays")

    def _give_up(self, book: Book, seen: Witness, wrong: str) -> None:
        """With --new-ledger, mark for ever what a witness knew and this ledger does not; else raise LedgerError."""
        if not self._gives_up:
            raise LedgerError(wrong)
        if asdict(seen) not in book.marks:
            self._chain.append("mark", **asdict(seen))

    def _write(self, book: Book, dataset: str) -> None:
        write_witness(self._files[dataset], Witness(dataset, book.ledger["ledger_id"], book.rows, book.head))
