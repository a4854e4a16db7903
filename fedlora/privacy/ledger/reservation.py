"""One training's way through the ledger: charged, begun or voided, stored, released; never back, and none left out."""

from __future__ import annotations

from collections.abc import Callable

from fedlora.privacy.ledger.hash_chain import HashChain
from fedlora.privacy.ledger.lifetime_budget import LedgerError


class Reservation:
    """One charged training. Made by `Ledger.reserve`; of no use after the process ends.

    Args:
        sequence: of the charge.
        release: writes the witness, then the ledger, or raises LedgerError.
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
        """Right before the first record is read. From here on it is spent, and good for one training.

        Raises:
            LedgerError: it has begun before, or was voided.
        """
        with self._chain.mutex:
            self._step(expected="reserved", to="begun")

    def void(self) -> None:
        """Nothing was read and nothing will be: take the charge back.

        Raises:
            LedgerError: it has begun, or the disk failed; then it stays charged, and is of no more use.
        """
        with self._chain.mutex:
            self._step(expected="reserved", to="voided")  # whatever the disk says: it can no longer begin
            with self._chain.transaction():
                self._chain.append("voided", charge=self.sequence)

    def stored(self, sha256: str) -> None:
        """The finished, noised update is on the disk; `sha256` (64 hex digits) is that of its bytes.

        Raises:
            LedgerError: the training has not begun, or the disk failed.
        """
        with self._chain.mutex:
            if self._state != "begun":
                raise LedgerError(f"charge {self.sequence} is {self._state}: call begin before the training")
            with self._chain.transaction():
                self._chain.append("stored", charge=self.sequence, sha256=sha256)
            self._state = "stored"

    def released(self) -> None:
        """Right before the update leaves: the witness, then the ledger. Again, for sending again: no cost.

        Raises:
            LedgerError: it was not stored, or witness or ledger cannot be written; nothing may leave then.
        """
        self._release()
