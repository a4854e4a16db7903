"""The states of one charged training: reserved, then begun (or voided), stored, released. None is skipped or undone."""

from __future__ import annotations

from collections.abc import Callable

from fedlora.privacy.ledger.hash_chain import HashChain
from fedlora.privacy.ledger.lifetime_budget import LedgerError


class Reservation:
    """One charged training, as returned by `Ledger.reserve`. It can be used in this process only.

    Args:
        chain: the ledger's chain of events.
        sequence: sequence number of the charge.
        release: writes the witness, then the ledger; raises LedgerError if either fails.
    """

    def __init__(self, chain: HashChain, sequence: int, release: Callable[[], None]) -> None:
        self._chain, self.sequence, self._release = chain, sequence, release
        self._state = "reserved"

    def _step(self, *, expected: str, to: str) -> None:
        self._chain.check_process()
        if self._state != expected:
            raise LedgerError(f"charge {self.sequence} is {self._state} and cannot become {to}; a second training "
                              "needs a charge of its own")
        self._state = to

    def begin(self) -> None:
        """Record in this process that the first record is about to be read. From here on the charge cannot be voided.

        Nothing is written: the charge itself is on the disk already, and counts unless it was voided.

        Raises:
            LedgerError: the training has begun before, or was voided.
        """
        with self._chain.mutex:
            self._step(expected="reserved", to="begun")

    def void(self) -> None:
        """Take the charge back, because nothing was read and nothing will be.

        Raises:
            LedgerError: the training has begun, or the disk failed. Then it stays charged and cannot be used any more.
        """
        with self._chain.mutex:
            self._step(expected="reserved", to="voided")  # first of all: even if the disk fails, it can no longer begin
            with self._chain.transaction():
                self._chain.append("voided", charge=self.sequence)

    def stored(self, sha256: str) -> None:
        """Record that the finished, noised update is on the disk.

        Args:
            sha256: hash of the update's bytes, 64 hexadecimal digits.

        Raises:
            LedgerError: the training has not begun, or the disk failed.
        """
        with self._chain.mutex:
            if self._state != "begun":
                raise LedgerError(f"charge {self.sequence} is {self._state}; call begin before the training")
            with self._chain.transaction():
                self._chain.append("stored", charge=self.sequence, sha256=sha256)
            self._state = "stored"

    def released(self) -> None:
        """Record that the update is about to leave: first in the witness, then in the ledger.

        Call this right before sending. Calling it again, to send again, costs nothing.

        Raises:
            LedgerError: the update was not stored, or the witness or the ledger cannot be written. Then nothing may
                leave.
        """
        self._release()
