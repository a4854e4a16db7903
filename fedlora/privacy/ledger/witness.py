"""The witness file: a small file beside the data that states how far the ledger had come when an update last left.

It contradicts a ledger that is missing, was restored from an older copy, or is not the one that wrote it. It cannot
tell if witness and ledger were deleted together, or if a copy of the data is used on another machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlora.files import replace_file
from fedlora.privacy.ledger.lifetime_budget import LedgerError


@dataclass(frozen=True)
class Witness:
    """The state of a ledger that a witness has seen.

    Attributes:
        dataset: id of the data set for which it was written; "" for an anchor.
        ledger_id: the ledger.
        rows: number of the ledger's events.
        head: the chain's hash after them, 64 hexadecimal digits.
    """

    dataset: str
    ledger_id: str
    rows: int
    head: str


def witness_file(folder: Path, dataset: str) -> Path:
    """Return the path of a data set's witness file in a folder."""
    return folder / f".fedlora-witness-{dataset}.json"


def witnesses_in(folder: Path) -> list[Path]:
    """Return the paths of all witness files in a folder, sorted; none if there is no such folder."""
    return sorted(folder.glob(witness_file(Path(), "*").name))


def read_witness(path: Path) -> Witness | None:
    """Read a witness file.

    Returns:
        None if there is no such file.

    Raises:
        LedgerError: the file cannot be read as a witness.
    """
    try:
        witness = Witness(**json.loads(path.read_text()))
        if not isinstance(witness.rows, int) or not 0 <= witness.rows < 2**63 or not isinstance(witness.head, str):
            raise ValueError("rows or head")
        return witness
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(f"{path}, the ledger's witness, cannot be read ({error}). Restore it, or use --new-ledger: "
                          "spending that the ledger does not know is then not counted, and it says so for ever"
                          ) from error


def write_witness(path: Path, witness: Witness) -> None:
    """Write a witness file. It is on the disk when this returns.

    Raises:
        LedgerError: the file cannot be written; then nothing may leave.
    """
    try:
        replace_file(path, json.dumps(asdict(witness)).encode())
    except OSError as error:
        raise LedgerError(f"{path}, the ledger's witness, cannot be written ({error.strerror}), so nothing may leave; "
                          "make room, make its folder writable, or set `witness` in policy.toml to another folder"
                          ) from error
